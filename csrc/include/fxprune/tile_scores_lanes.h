// The kernel of fxprune::tile_scores. Squares of floats are exact as doubles, which also hold every
// sum of them: nothing has to be scaled, and a fused multiply-add gives the same bits as two steps.
// Include only under a target pragma.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "fxprune/tile_scores.h"

namespace fxprune {

// As many floats as doubles fit in a vector of Width floats.
template <int Width>
struct WideLanes;

#define FXPRUNE_WIDE_LANES(width)                                  \
  template <>                                                      \
  struct WideLanes<width> {                                        \
    typedef float Float __attribute__((vector_size(2 * width)));   \
    typedef double Double __attribute__((vector_size(4 * width))); \
  };
FXPRUNE_WIDE_LANES(4)
FXPRUNE_WIDE_LANES(8)
FXPRUNE_WIDE_LANES(16)
#undef FXPRUNE_WIDE_LANES

// Tiles [first, last).
template <class V>
void tile_scores(const TileScores& s, int64_t first, int64_t last) {
  using Float = typename WideLanes<V::kWidth>::Float;
  using Double = typename WideLanes<V::kWidth>::Double;
  constexpr int kLanes = V::kWidth / 2, kVecs = 8, kStep = kLanes * kVecs;
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t *begin = s.begin(tile), *end = s.end(tile);
    const double features = static_cast<double>(end - begin);
    float* scores = s.scores + tile * s.k;
    int64_t k = 0;
    for (; k + kStep <= s.k; k += kStep) {
      Double sums[kVecs] = {};
      for (const int64_t* feature = begin; feature < end; ++feature) {
        const float* row = s.values + *feature * s.k + k;
        for (int v = 0; v < kVecs; ++v) {
          Float x;
          std::memcpy(&x, row + v * kLanes, sizeof x);
          const Double wide = __builtin_convertvector(x, Double);
          sums[v] += wide * wide;
        }
      }
      for (int i = 0; i < kStep; ++i) {
        const double mean = sums[i / kLanes][i % kLanes] / features;
        scores[k + i] = static_cast<float>(std::sqrt(mean));
      }
    }
    for (; k < s.k; ++k) {
      double sum = 0;
      for (const int64_t* feature = begin; feature < end; ++feature) {
        const double x = s.values[*feature * s.k + k];
        sum += x * x;
      }
      scores[k] = static_cast<float>(std::sqrt(sum / features));
    }
  }
}

}  // namespace fxprune
