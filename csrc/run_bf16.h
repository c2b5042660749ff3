// Runs a prepared operator on bfloat16 activations: as run.h, with the kernels' own way of cutting.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"
#include "run.h"

namespace fxprune {

// The values of a tile-packed weight as the kernels take them: an image (R, 32) as it is, packed
// values (nnz) turned into one.
class TileImage {
 public:
  TileImage(const Tensor& values, int64_t nnz, const TileShape& a) {
    check_tensor(values, "values", element_types().bfloat16, "bfloat16");
    const bool image = values.dim() == 2;
    if (image) {
      check_shape(values, "values", {image_offset(a, a.tiles) / kDeep, kDeep});
    } else {
      check_shape(values, "values", {nnz});
    }
    tensor_ = values.is_contiguous() ? values : torch::stable::contiguous(values);
    set(fxprune::data<Bf16>(*tensor_), image, a);
  }
  TileImage(const Span<Bf16>& values, bool image, int64_t nnz, const TileShape& a) {
    const int64_t expected = image ? image_offset(a, a.tiles) : nnz;
    STD_TORCH_CHECK(values.size == expected, "values must hold ", expected, " numbers, got ",
                    values.size);
    set(values.data, image, a);
  }
  TileImage(const TileImage&) = delete;
  TileImage& operator=(const TileImage&) = delete;
  const Bf16* data() const { return data_; }

 private:
  void set(const Bf16* values, bool image, const TileShape& a) {
    data_ = values;
    if (image) return;
    built_.resize(image_offset(a, a.tiles));
    for_each_in_image(a, [&](int64_t at) { built_[at] = *values++; });
    data_ = built_.data();
  }

  std::optional<Tensor> tensor_;
  std::vector<Bf16> built_;
  const Bf16* data_;
};

inline void run_depthwise(const DepthwiseTapsBf16& a, int64_t pool) {
  const Kernels& k = kernels();
  for_each_plane_span(a, pool, [&](const PlaneSpan& span) {
    k.bf16.depthwise_taps_bf16(a, span, tap_list(a), scratch(depthwise_bf16_scratch(a)));
  });
}

// Blocks of 32 pixels or rows are cut first. Few of them: tiles are cut as well, one part a thread,
// because every part packs the activations anew.
inline TileGrid bf16_grid(const TileShape& a, bool feature_major, int64_t pool) {
  const int64_t blocks = (a.m + 31) / 32, images = feature_major ? a.batch : 1;
  TileGrid g{images, blocks, blocks, 1, 1};
  if (pool == 1) return g;
  if (images * blocks >= 4 * pool) {
    // Every unit reads all weights: few units, each of as many blocks as stay in L2 together.
    g.step = std::clamp<int64_t>(images * blocks / (2 * pool), 1, std::min(blocks, bf16_group(a)));
    g.length_parts = (blocks + g.step - 1) / g.step;
  } else if (images < pool) {
    g.tile_parts = std::min(pool, std::max<int64_t>(a.tiles, 1));
  }
  return g;
}

inline void run_tile_gemm(const TileGemmBf16& a, bool feature_major, int64_t pool) {
  const Bf16Kernels& k = kernels().bf16;
  const TileGrid grid = bf16_grid(a, feature_major, pool);
  const auto kernel = feature_major ? k.tile_gemm_bf16_feature_major : k.tile_gemm_bf16_row_major;
  for_each_unit(grid.units(), pool, [&](int64_t unit) {
    kernel(a, tile_unit(a, grid, unit), scratch<1>(k.bf16_scratch(a, grid.step)));
  });
}

inline void run_channel_mean(const Bf16* x, Bf16* out, int64_t channels, int64_t size) {
  kernels().bf16.channel_mean_bf16(x, out, channels, size);
}

// As its twin for float. One part a thread where possible: each packs the whole image.
inline void run_expand_depthwise(const TileGemmBf16& g, const DepthwiseTapsBf16& d, int64_t pool) {
  const Bf16Kernels& k = kernels().bf16;
  const int64_t blocks = (g.m + kPixels - 1) / kPixels, rows = band_length(d, kernels().width);
  const int64_t fit =
      std::max<int64_t>(1, kExpandedTile / std::max<int64_t>(g.granularity * g.m, 1));
  const int64_t each = std::min(fit, (g.tiles + pool - 1) / pool);
  for_each_unit((g.tiles + each - 1) / each, pool, [&](int64_t unit) {
    const int64_t begin = unit * each, end = std::min(begin + each, g.tiles);
    const int64_t first = g.first_column(begin), last = g.first_column(end);
    // Both kernels address planes by feature, so the planes' base is moved back by those in front.
    Bf16* planes = scratch_of<2, Bf16>((last - first) * g.m) - first * g.m;
    TileGemmBf16 expand = g;
    expand.out = planes;
    k.tile_gemm_bf16_feature_major(expand, {0, 0, blocks, begin, end},
                                   scratch<1>(k.bf16_scratch(g, blocks)));
    DepthwiseTapsBf16 taps = d;
    taps.x = planes;
    k.depthwise_taps_bf16(taps, {first, last, 0, rows}, tap_list(d),
                          scratch(depthwise_bf16_scratch(d)));
  });
}

}  // namespace fxprune
