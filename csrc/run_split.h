// Runs a feature-major GEMM with K split over the threads: each multiplies the input features that
// it wrote itself, and only sums cross from core to core.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "fxprune/kernels.h"
#include "parallel.h"

namespace fxprune {

constexpr int64_t kMostSums = 64 * 1024;  // floats of a part of K

// True where the input is worth more than the sums: more features in than out, of a small image,
// whose rows the kernel in front cut by feature as well.
inline bool splits_k(const TileGemm& a, bool feature_major, int64_t pool) {
  constexpr int64_t kLeast = 32;  // input features of a part
  return pool > 1 && feature_major && a.k >= 2 * a.n && a.k >= kLeast * pool &&
         a.kept % a.granularity == 0 && a.n * a.m <= kMostSums &&
         !uses_panel(a, feature_major, kernels().width);
}

// Where every tile's list of input features passes from one part of K to the next: parts + 1 rows
// of `tiles` offsets.
inline std::vector<int32_t> k_cuts(const TileGemm& a, int64_t parts) {
  std::vector<int32_t> cuts((parts + 1) * a.tiles);
  for (int64_t p = 0; p <= parts; ++p) {
    for (int64_t t = 0; t < a.tiles; ++t) {
      const int32_t *begin = a.index + a.tile_ptr[t], *end = a.index + a.tile_end[t];
      const int32_t first = static_cast<int32_t>(a.k * p / parts);
      cuts[p * a.tiles + t] = static_cast<int32_t>(std::lower_bound(begin, end, first) - a.index);
    }
  }
  return cuts;
}

// Every part's sums keep their place from layer to layer, so that a core finds its own again.
constexpr int64_t kSumsStride = kMostSums + 64;

// sums: pool * kSumsStride floats, shared by all threads.
inline void run_tile_gemm_split(const TileGemm& a, float* sums, int64_t pool) {
  const Kernels& k = kernels();
  const std::vector<int32_t> cuts = k_cuts(a, pool);
  const int64_t vecs = (a.m + k.width - 1) / k.width, chunks = std::min<int64_t>(2, a.tiles);
  for_each_unit(pool * chunks, pool, [&](int64_t unit) {
    const int64_t part = unit / chunks, chunk = unit % chunks;
    TileGemm g = a;
    g.tile_ptr = cuts.data() + part * a.tiles;
    g.tile_end = g.tile_ptr + a.tiles;
    g.bias = part == 0 ? a.bias : nullptr;
    g.residual = nullptr;
    g.activation = Activation::kNone;
    g.out = sums + part * kSumsStride;
    const TileSpan span = {0, 0, vecs, a.tiles * chunk / chunks, a.tiles * (chunk + 1) / chunks};
    k.tile_gemm_feature_major(g, span,
                              a.gate ? scratch(a.tile_ptr[a.tiles] * a.granularity) : nullptr);
  });
  const PartialSums total = {sums, pool, kSumsStride, a.residual, a.out, a.activation};
  const int64_t count = a.n * a.m;
  for_each_unit(pool, pool, [&](int64_t part) {
    k.partial_sums(total, count * part / pool, count * (part + 1) / pool);
  });
}

}  // namespace fxprune
