// What operators demand of packed weights. Sizes are checked apart from contents: a region knows
// its sizes once and for all, contents may change from call to call.
#pragma once

#include <vector>

#include "check.h"

namespace fxprune {

// Checks how many words of tap masks there are, one bit per tap that is kept.
inline void check_tap_count(int64_t words, DepthwiseShape* a) {
  a->tap_words = (a->kernel() + 63) / 64;
  STD_TORCH_CHECK(words % a->tap_words == 0 && words / a->tap_words == a->channels,
                  "taps must hold ", a->tap_words, " numbers for each of ", a->channels,
                  " channels, got ", words);
}

// Checks the masks themselves, and sets them.
inline void check_tap_masks(const int64_t* taps, DepthwiseShape* a) {
  a->taps = reinterpret_cast<const uint64_t*>(taps);
  const int64_t used = a->kernel() % 64;
  if (used == 0) return;
  for (int64_t c = 0; c < a->channels; ++c) {
    const uint64_t last = a->taps[c * a->tap_words + a->tap_words - 1];
    STD_TORCH_CHECK(last >> used == 0, "taps of channel ", c, " set a bit past tap ",
                    a->kernel() - 1);
  }
}

// Both, for tensors of shape (C, KH * KW) and (C, words). Returns the masks' owner.
inline Tensor check_taps(const Tensor& weight, const Tensor& taps_in, DepthwiseShape* a) {
  check_shape(weight, "weight", {a->channels, a->kernel()});
  check_tensor(taps_in, "taps", element_types().int64, "int64");
  check_shape(taps_in, "taps", {a->channels, (a->kernel() + 63) / 64});
  const Tensor taps = taps_in.is_contiguous() ? taps_in : torch::stable::contiguous(taps_in);
  check_tap_count(taps.numel(), a);
  check_tap_masks(data<int64_t>(taps), a);
  return taps;
}

// The index lists of a tile-packed weight.
struct TileLists {
  Span<int32_t> index, tile_ptr, columns;
};

// Numbers in each of them.
struct TileSizes {
  int64_t index, tile_ptr, columns;
};
inline TileSizes sizes_of(const TileLists& lists) {
  return {lists.index.size, lists.tile_ptr.size, lists.columns.size};
}

// Checks all of a tile-packed weight that does not depend on the lists' contents, and sets it.
inline void check_tile_sizes(const TileSizes& sizes, int64_t granularity, int64_t out_features,
                             int64_t in_features, TileShape* a) {
  STD_TORCH_CHECK(granularity >= 1, "granularity must be at least 1, got ", granularity);
  STD_TORCH_CHECK(out_features >= 0, "out_features must not be negative, got ", out_features);
  STD_TORCH_CHECK(in_features >= 0, "in_features must not be negative, got ", in_features);
  a->kept = sizes.columns;
  // no product below can overflow
  a->granularity = std::min(granularity, std::max<int64_t>(a->kept, 1));
  a->tiles = (a->kept + a->granularity - 1) / a->granularity;
  STD_TORCH_CHECK(sizes.tile_ptr == a->tiles + 1, "tile_ptr must have ", a->tiles + 1,
                  " entries for ", a->kept, " columns in tiles of ", a->granularity, ", got ",
                  sizes.tile_ptr);
  a->n = out_features;
  a->k = in_features;
}

// Checks the contents of lists whose sizes were, and sets what points to them. Returns the number
// of packed weights.
inline int64_t check_tile_lists(const TileLists& lists, TileShape* a) {
  const int32_t* ptr = lists.tile_ptr.data;
  const int64_t nnz = lists.index.size;
  STD_TORCH_CHECK(ptr[0] == 0, "tile_ptr must begin with 0, got ", ptr[0]);
  STD_TORCH_CHECK(ptr[a->tiles] == nnz, "tile_ptr must end with the length of index, ", nnz,
                  ", got ", ptr[a->tiles]);
  for (int64_t t = 0; t < a->tiles; ++t) {
    STD_TORCH_CHECK(ptr[t] <= ptr[t + 1], "tile_ptr must not decrease, got ", ptr[t], " before ",
                    ptr[t + 1], " at entry ", t + 1);
  }
  const Kernels& k = kernels();
  a->index = lists.index.data;
  a->columns = lists.columns.data;
  STD_TORCH_CHECK(k.all_below(a->index, nnz, a->k), "index must lie in [0, ", a->k,
                  "), the input features");
  STD_TORCH_CHECK(k.all_below(a->columns, a->kept, a->n), "columns must lie in [0, ", a->n,
                  "), the output features");
  STD_TORCH_CHECK(k.increasing(a->columns, a->kept), "columns must increase strictly");
  a->tile_ptr = ptr;
  a->tile_end = ptr + 1;
  if (a->tiles == 0) return 0;
  const int64_t last =
      ptr[a->tiles] - ptr[a->tiles - 1];  // rows of the one tile that may be narrow
  return (nnz - last) * a->granularity + last * a->width(a->tiles - 1);
}

// Both, for a linear layer or a 1x1 convolution.
inline int64_t check_tiles(const TileLists& lists, int64_t granularity, int64_t out_features,
                           int64_t in_features, TileShape* a) {
  check_tile_sizes(sizes_of(lists), granularity, out_features, in_features, a);
  return check_tile_lists(lists, a);
}

// As check_tile_sizes, for the convolution in `a`, whose window is set; completes that.
template <class Conv>
void check_conv_sizes(const TileSizes& sizes, int64_t granularity, int64_t out_features, Conv* a) {
  check_window(a);
  STD_TORCH_CHECK(a->groups >= 1 && a->channels % a->groups == 0 && out_features % a->groups == 0,
                  "groups must divide ", a->channels, " input and ", out_features,
                  " output channels, got ", a->groups);
  constexpr int64_t kMost = int64_t{1} << 24;
  const int64_t window = a->kernel_h * a->kernel_w, channels = a->group_channels();
  STD_TORCH_CHECK(window <= kMost && channels * window <= kMost, "a group of ", channels,
                  " channels under a window of ", window, " elements is too large");
  check_tile_sizes(sizes, granularity, out_features, channels * window, a);
  a->m = a->out_h * a->out_w;
}

// As check_tile_lists, for a convolution.
template <class Conv>
int64_t check_conv_lists(const TileLists& lists, Conv* a) {
  const int64_t values = check_tile_lists(lists, a);
  for (int64_t t = 0; t < a->tiles && a->groups > 1; ++t) {
    const int64_t last = a->columns[a->first_column(t + 1) - 1];
    STD_TORCH_CHECK(a->group_of(t) == last / (a->n / a->groups),
                    "a tile must lie inside one group, got output features ",
                    a->columns[a->first_column(t)], " to ", last, " in tile ", t);
  }
  return values;
}

template <class Conv>
int64_t check_conv(const TileLists& lists, int64_t granularity, int64_t out_features, Conv* a) {
  check_conv_sizes(sizes_of(lists), granularity, out_features, a);
  return check_conv_lists(lists, a);
}

// Index lists that are tensors: made contiguous, and kept.
class TileTensors {
 public:
  TileTensors(const Tensor& index, const Tensor& tile_ptr, const Tensor& columns)
      : kept_{int_list(index, "index"), int_list(tile_ptr, "tile_ptr"),
              int_list(columns, "columns")} {}
  TileLists lists() const {
    return {span_of<int32_t>(kept_[0]), span_of<int32_t>(kept_[1]), span_of<int32_t>(kept_[2])};
  }

 private:
  static Tensor int_list(const Tensor& t, const char* name) {
    check_tensor(t, name, element_types().int32, "int32");
    STD_TORCH_CHECK(t.dim() == 1, name, " must have one dimension, got shape ", shape_of(t));
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  }

  Tensor kept_[3];
};

}  // namespace fxprune
