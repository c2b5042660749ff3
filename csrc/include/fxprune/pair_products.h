// Products of a strip of weights with the gathered rows of a block of pixels, by dot products of
// pairs. amx.h has the variant of the matrix unit.
//
//   sums[r][p] (+)= sum over d of image[d / 32][r][d % 32] * x[d][p]      r < rows, p < 16 * halves
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/tile_image.h"
#include "fxprune/unroll.h"

namespace fxprune {

template <class V>
struct PairProducts {
  using Reg = typename V::Reg;
  static constexpr int kW = V::kWidth, kRows = V::kPairRows, kVecs = V::kPairVecs;

  // image: `strips` (1 or 2) strips of `rows` features, `stride` apart, `depth` blocks of each.
  // pairs: [16 * depth][kPixels][2]. sums: [strips * rows][kPixels], added to or set.
  void run(const Bf16* image, int64_t stride, int64_t depth, int64_t rows, int64_t strips,
           const Bf16* pairs, int64_t halves, bool add, float* sums) const {
    const int64_t used = halves * kPixels / 2;
    for (int64_t s = 0; s < strips; ++s, image += stride, sums += rows * kPixels) {
      for (int64_t r = 0; r < rows; r += kRows) {
        for (int64_t p = 0; p < used; p += kVecs * kW)
          tile(image + r * kDeep, depth, rows, pairs + 2 * p, add, sums + r * kPixels + p);
      }
    }
  }

 private:
  static void tile(const Bf16* image, int64_t depth, int64_t rows, const Bf16* pairs, bool add,
                   float* sums) {
    Reg acc[kRows][kVecs];
    FXPRUNE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FXPRUNE_UNROLL
      for (int v = 0; v < kVecs; ++v)
        acc[r][v] = add ? V::load(sums + r * kPixels + v * kW) : V::zero();
    }
    for (int64_t d = 0; d < depth; ++d, image += rows * kDeep) {
      for (int64_t i = 0; i < kDeep; i += 2, pairs += 2 * kPixels) {
        typename V::Pairs x[kVecs];
        FXPRUNE_UNROLL
        for (int v = 0; v < kVecs; ++v) x[v] = V::load_pairs(pairs + 2 * v * kW);
        FXPRUNE_UNROLL
        for (int r = 0; r < kRows; ++r) {
          const auto weight = V::set1_pairs(image + r * kDeep + i);
          FXPRUNE_UNROLL
          for (int v = 0; v < kVecs; ++v) acc[r][v] = V::dot(weight, x[v], acc[r][v]);
        }
      }
    }
    FXPRUNE_UNROLL
    for (int r = 0; r < kRows; ++r) {
      FXPRUNE_UNROLL
      for (int v = 0; v < kVecs; ++v) V::store(sums + r * kPixels + v * kW, acc[r][v]);
    }
  }
};

}  // namespace fxprune
