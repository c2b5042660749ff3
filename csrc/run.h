// Runs a prepared operator on the thread pool: how its work is cut, and by which kernel.
//
// `pool` is the number of threads to use; 1 runs in the caller, for regions that give each thread
// an image of its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "caches.h"
#include "fxprune/kernels.h"
#include "geometry_cache.h"
#include "parallel.h"

namespace fxprune {

// What a depthwise convolution needs beside its arguments, the same for every channel and image.
class DepthwiseTables {
 public:
  DepthwiseTables(const DepthwiseShape& a, int64_t width)
      : masks_(depthwise_mask_count(a, width)), sites_(a.kernel()), zeros_(a.width) {
    depthwise_sites(a, width, sites_.data(), masks_.data());
  }
  void attach(DepthwiseShape* a) const { a->sites = sites_.data(), a->zeros = zeros_.data(); }

 private:
  std::vector<uint32_t> masks_;
  std::vector<TapSite> sites_;
  std::vector<float> zeros_;
};

// Outputs of a vector of the kernel, which tables and bands count in.
inline int64_t depthwise_width(const DepthwiseShape&, const float*) {
  return kernels().width;
}
inline int64_t depthwise_width(const DepthwiseShape& a, const Bf16*) {
  return kernels().bf16.depthwise_bf16_width(a);
}

// Fills the arguments' pointers into the tables, which must outlive the run. T: of the activations.
template <class T>
std::shared_ptr<const DepthwiseTables> depthwise_tables(DepthwiseShape* a) {
  static GeometryCache<DepthwiseTables> cache;
  if (!a->vectorised()) return nullptr;
  const int64_t width = depthwise_width(*a, static_cast<const T*>(nullptr));
  auto tables = cache.get({width, a->height, a->width, a->kernel_h, a->kernel_w, a->stride_h,
                           a->stride_w, a->pad_h, a->pad_w, a->dilation_h, a->dilation_w},
                          [&] { return std::make_shared<DepthwiseTables>(*a, width); });
  tables->attach(a);
  return tables;
}

// Bands of pixels that one image's plane of `length` vectors is cut in, one a thread, so that what
// a core writes is what it reads in the next operator. Planes too small for it are cut by feature.
inline int64_t pixel_bands(int64_t length, int64_t pool) {
  constexpr int64_t kLeast = 48;  // vectors of a band
  return length >= kLeast * pool ? pool : 1;
}

// Calls f(span) for every unit of a depthwise convolution.
template <class T, class F>
void for_each_plane_span(const DepthwiseTapsOf<T>& a, int64_t pool, const F& f) {
  const int64_t width = depthwise_width(a, a.x);
  const int64_t planes = a.batch * a.channels;
  // Few images of large planes are cut in bands, one a thread, as the pointwise GEMMs around cut
  // their pixels: each core then reads what it wrote. Small planes, or enough images, are cut by
  // plane.
  constexpr int64_t kLargePlane = 24 * 24;
  const bool banded = a.vectorised() && a.batch < pool && a.out_h * a.out_w >= kLargePlane;
  const int64_t length = band_length(a, width), bands = banded ? std::min(pool, length) : 1;
  // Eight units a thread: enough to even out a busy core, few enough to keep planes together.
  const int64_t chunks = std::min(planes, (pool * 8 + bands - 1) / bands);
  for_each_unit(bands * chunks, pool, [&](int64_t unit) {
    const int64_t band = unit / chunks, chunk = unit % chunks;
    f(PlaneSpan{planes * chunk / chunks, planes * (chunk + 1) / chunks, length * band / bands,
                length * (band + 1) / bands});
  });
}

inline void run_depthwise(const DepthwiseTaps& a, int64_t pool) {
  const Kernels& k = kernels();
  for_each_plane_span(a, pool, [&](const PlaneSpan& span) { k.depthwise_taps(a, span); });
}

// Parts of a product's tiles whose weights stay in L2.
template <class T>
int64_t weight_parts(const TileGemmOf<T>& a) {
  const int64_t bytes = int64_t{a.tile_ptr[a.tiles]} * a.granularity * sizeof(T);
  return std::clamp<int64_t>(weight_parts(bytes), 1, std::max<int64_t>(a.tiles, 1));
}

// Feature-major: pixels are cut first. Where an image has too few of them and its input fits L2,
// tiles are cut as well, and then a unit takes every pixel of its image, so that its weights are
// read once.
inline TileGrid feature_major_grid(const TileGemm& a, const Kernels& k, int64_t pool) {
  const int64_t vecs = (a.m + k.width - 1) / k.width;
  TileGrid g{a.batch, vecs, vecs, 1, 1};
  const int64_t blocks = (vecs + k.tile_vecs - 1) / k.tile_vecs;
  const bool near = a.k * a.m * int64_t{sizeof(float)} <= l2_bytes();  // one image's input
  if (pool == 1) {
    if (near) g.tile_parts = weight_parts(a);
    return g;
  }
  if (a.batch * blocks >= (near ? 8 : 4) * pool) {
    const int64_t each = std::max<int64_t>(1, a.batch * blocks / (8 * pool));
    g.step = std::min(vecs, each * k.tile_vecs);
    g.length_parts = (vecs + g.step - 1) / g.step;
  } else {
    g.tile_parts =
        std::clamp<int64_t>((4 * pool + a.batch - 1) / a.batch, 1, std::max<int64_t>(a.tiles, 1));
  }
  return g;
}

// Row-major: the weights of a unit stay in L2 while rows stream by, and are read anew for each part
// of the rows.
inline TileGrid row_major_grid(const TileGemm& a, int64_t pool) {
  constexpr int64_t kRows = 512;
  const int64_t most = of_l2(200 * 1024);  // numbers
  const int64_t weights = int64_t{a.tile_ptr[a.tiles]} * a.granularity;
  TileGrid g{1, a.m, a.m, (a.m + kRows - 1) / kRows, (weights + most - 1) / most};
  g.step = (a.m + g.length_parts - 1) / g.length_parts;
  if (pool > 1) g.tile_parts = std::max(g.tile_parts, 4 * pool / g.length_parts);
  g.tile_parts = std::clamp<int64_t>(g.tile_parts, 1, std::max<int64_t>(a.tiles, 1));
  return g;
}

// On a panel: each unit copies what it multiplies, so pixels or rows are cut before tiles.
inline TileGrid panel_grid(const TileGemm& a, bool feature_major, const Kernels& k, int64_t pool) {
  const int64_t unit = feature_major ? 1 : k.width;  // of length
  const int64_t vecs = (a.m + k.width - 1) / k.width, images = feature_major ? a.batch : 1;
  const int64_t most =
      std::clamp<int64_t>(of_l2(256 * 1024) / std::max<int64_t>(a.k * k.width, 1), 4, kPanelVecs);
  TileGrid g{images, feature_major ? vecs : a.m, most * unit, 1, 1};
  g.length_parts = (g.length + g.step - 1) / g.step;
  g.step = ((g.length + g.length_parts - 1) / g.length_parts + unit - 1) / unit * unit;
  if (pool > 1 && images * g.length_parts < pool) {
    g.tile_parts = std::clamp<int64_t>(2 * pool, 1, std::max<int64_t>(a.tiles, 1));
  }
  return g;
}

inline void run_tile_gemm_panel(const TileGemm& a, bool feature_major, int64_t pool) {
  const Kernels& k = kernels();
  const TileGrid grid = panel_grid(a, feature_major, k, pool);
  const auto kernel = feature_major ? k.tile_gemm_panel_feature_major : k.tile_gemm_panel_row_major;
  for_each_unit(grid.units(), pool, [&](int64_t unit) {
    kernel(a, tile_unit(a, grid, unit), scratch(panel_scratch(a, k.width)));
  });
}

inline void run_tile_gemm(const TileGemm& a, bool feature_major, int64_t pool) {
  const Kernels& k = kernels();
  // One row is one pixel, too, whose output features in vectors need no panel.
  feature_major |= a.batch * a.m == 1 && uses_panel(a, false, k.width);
  if (uses_panel(a, feature_major, k.width)) return run_tile_gemm_panel(a, feature_major, pool);
  const TileGrid grid = feature_major ? feature_major_grid(a, k, pool) : row_major_grid(a, pool);
  const auto kernel = feature_major ? k.tile_gemm_feature_major : k.tile_gemm_row_major;
  for_each_unit(grid.units(), pool, [&](int64_t unit) {
    kernel(a, tile_unit(a, grid, unit),
           a.gate ? scratch(a.tile_ptr[a.tiles] * a.granularity) : nullptr);
  });
}

// pitch: from plane to plane.
inline void run_channel_mean(const float* x, float* out, int64_t channels, int64_t size,
                             int64_t pitch) {
  kernels().channel_mean(x, out, channels, size, pitch);
}

// Largest expanded tile, in numbers, that run_expand_depthwise keeps beside the rest of its working
// set in L2.
constexpr int64_t kExpandedTile = 160 * 1024;
constexpr int64_t kNear = 32 * 1024;  // of a band of expanded tiles
constexpr int64_t kLeastRows = 8;     // output rows of a band, beside those computed twice

inline bool can_expand_depthwise(const TileShape& g) {
  return g.kept == g.n && g.tiles > 0 && g.granularity * g.m <= kExpandedTile;
}
inline bool can_expand_depthwise(const TileGemm& g) {
  const TileShape& shape = g;
  return !uses_panel(g, true, kernels().width) && can_expand_depthwise(shape);
}

// A feature-major GEMM and the depthwise convolution of its result, band by band and tile by tile:
// the expanded rows that a band reads, of a few tiles, stay in this core's nearest caches and never
// reach the arena. One image; every output feature kept; neither residual nor gate. Neighbouring
// bands both compute the expanded rows between them.
inline void run_expand_depthwise(const TileGemm& g, const DepthwiseTaps& d, int64_t pool) {
  const Kernels& k = kernels();
  const int64_t rows = band_length(d, k.width), width = k.width;
  const int64_t plane = (d.out_h * d.out_w + width - 1) / width, tile = g.granularity * g.m;
  int64_t bands = d.vectorised() ? std::min(pixel_bands(plane, pool), rows) : 1;
  if (d.vectorised() && !d.flat(width)) {
    const int64_t most = std::max<int64_t>(1, rows / kLeastRows);
    bands = std::max(bands, std::min(most, (tile + kNear - 1) / kNear));
  }
  const int64_t fit = std::max<int64_t>(1, kNear * bands / std::max<int64_t>(tile, 1));
  const int64_t each = std::min(fit, std::max<int64_t>(1, g.tiles * bands / (4 * pool)));
  const int64_t chunks = (g.tiles + each - 1) / each;
  for_each_unit(bands * chunks, pool, [&](int64_t unit) {
    const int64_t band = unit / chunks, band_begin = rows * band / bands,
                  band_end = rows * (band + 1) / bands;
    const int64_t begin = unit % chunks * each, end = std::min(begin + each, g.tiles);
    const int64_t first = g.first_column(begin), last = g.first_column(end);
    const PixelRange read = band_input(d, width, band_begin, band_end);
    const TileSpan span = {0, read.begin / width, (read.end + width - 1) / width, begin, end};
    // Whole cache lines, so that stores do not straddle two.
    const int64_t from = span.begin * width, pitch = (span.end * width - from + 15) / 16 * 16;
    // Both kernels address planes by feature and pixel, so the planes' base is moved back.
    float* planes = scratch((last - first) * pitch) - first * pitch - from;
    TileGemm expand = g;
    expand.out = planes;
    expand.out_gap = pitch - g.m;
    k.tile_gemm_feature_major(expand, span, nullptr);
    DepthwiseTaps taps = d;
    taps.x = planes;
    taps.x_gap = pitch - g.m;
    k.depthwise_taps(taps, {first, last, band_begin, band_end});
  });
}

}  // namespace fxprune
