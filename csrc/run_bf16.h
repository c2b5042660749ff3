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
    k.bf16.depthwise_taps_bf16(a, span, scratch(depthwise_bf16_scratch(a)));
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

// A single row, or a single pixel.
inline void run_tile_row(const TileGemmBf16& a, int64_t pool) {
  const Bf16Kernels& k = kernels().bf16;
  const TileGrid grid = {1, 1, 1, 1, pool == 1 ? 1 : std::clamp<int64_t>(a.tiles, 1, 4 * pool)};
  for_each_unit(grid.units(), pool, [&](int64_t unit) {
    k.tile_row_bf16(a, tile_unit(a, grid, unit), scratch<1>(row_scratch(a)));
  });
}

inline void run_tile_gemm(const TileGemmBf16& a, bool feature_major, int64_t pool) {
  const Bf16Kernels& k = kernels().bf16;
  if (a.batch * a.m == 1 && a.gate == nullptr) return run_tile_row(a, pool);
  const TileGrid grid = bf16_grid(a, feature_major, pool);
  const auto kernel = feature_major ? k.tile_gemm_bf16_feature_major : k.tile_gemm_bf16_row_major;
  for_each_unit(grid.units(), pool, [&](int64_t unit) {
    kernel(a, tile_unit(a, grid, unit), scratch<1>(k.bf16_scratch(a, grid.step)));
  });
}

// Pixels of an image that are worth a band a thread.
constexpr int64_t kLeastPixels = 256;

inline void run_channel_mean(const Bf16* x, Bf16* out, int64_t channels, int64_t size,
                             int64_t pitch) {
  kernels().bf16.channel_mean_bf16(x, out, channels, size, pitch);
}

inline bool can_expand_depthwise(const TileGemmBf16& g) {
  return g.kept == g.n && g.tiles > 0;
}

// One unit of work in the caller's thread.
inline void multiply(const TileGemmBf16& a, const TileSpan& span) {
  const Bf16Kernels& k = kernels().bf16;
  k.tile_gemm_bf16_feature_major(a, span, scratch<1>(k.bf16_scratch(a, span.end - span.begin)));
}
inline void convolve(const DepthwiseTapsBf16& d, const PlaneSpan& span) {
  kernels().bf16.depthwise_taps_bf16(d, span, scratch(depthwise_bf16_scratch(d)));
}

// One band of a depthwise convolution and the tiles [begin, end) of the product that feeds it, a
// few at a time, so that what lies between stays in this core's nearest caches. One image; every
// output feature of the product kept; it has neither residual nor gate.
inline void run_expand_band(const TileGemmBf16& g, const DepthwiseTapsBf16& d,
                            const TileSpan& tiles, int64_t band_begin, int64_t band_end) {
  constexpr int64_t kNearest = 16 * 1024;  // numbers of expanded tiles beside each other
  const PixelRange read = band_input(d, depthwise_width(d, d.x), band_begin, band_end);
  const TileSpan blocks = {0, read.begin / kPixels, (read.end + kPixels - 1) / kPixels, 0, 0};
  const int64_t from = blocks.begin * kPixels, pitch = (blocks.end - blocks.begin) * kPixels;
  const int64_t size = g.granularity * pitch,
                each = std::max<int64_t>(1, kNearest / std::max<int64_t>(size, 1));
  for (int64_t tile = tiles.tile_begin; tile < tiles.tile_end; tile += each) {
    const int64_t last = std::min(tile + each, tiles.tile_end);
    const int64_t first = g.first_column(tile), end = g.first_column(last);
    // Both kernels address planes by feature and pixel, so the planes' base is moved back.
    Bf16* planes = scratch_of<2, Bf16>((end - first) * pitch) - first * pitch - from;
    TileGemmBf16 expand = g;
    expand.out = planes;
    expand.out_gap = pitch - g.m;
    multiply(expand, {0, blocks.begin, blocks.end, tile, last});
    DepthwiseTapsBf16 taps = d;
    taps.x = planes;
    taps.x_gap = pitch - g.m;
    convolve(taps, {first, end, band_begin, band_end});
  }
}

// As its twin for float: bands of the image by parts of the tiles.
inline void run_expand_depthwise(const TileGemmBf16& g, const DepthwiseTapsBf16& d, int64_t pool) {
  constexpr int64_t kLargest = 64 * 1024;  // numbers of an expanded tile that stays near
  const int64_t width = depthwise_width(d, d.x), rows = band_length(d, width);
  const int64_t tile = g.granularity * g.m;
  int64_t bands = 1;
  if (d.vectorised()) {
    const int64_t most = std::max<int64_t>(1, rows / kLeastRows);
    bands = std::min(
        most, std::max((tile + kLargest - 1) / kLargest, g.m >= kLeastPixels * pool ? pool : 1));
  }
  const int64_t parts =
      std::clamp<int64_t>((2 * pool + bands - 1) / bands, 1, std::max<int64_t>(g.tiles, 1));
  for_each_unit(bands * parts, pool, [&](int64_t unit) {
    const int64_t band = unit / parts, part = unit % parts;
    const TileSpan tiles = {0, 0, 0, g.tiles * part / parts, g.tiles * (part + 1) / parts};
    run_expand_band(g, d, tiles, rows * band / bands, rows * (band + 1) / bands);
  });
}

}  // namespace fxprune
