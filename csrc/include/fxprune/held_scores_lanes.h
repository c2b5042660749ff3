// The kernel of fxprune::held_scores. Include only under a target pragma.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fxprune/held_scores.h"
#include "fxprune/lanes.h"

namespace fxprune {

// The bits of the largest of floats, each ANDed with `bits`, or those of 0. Bits of positive floats
// order as they do, NaN above Inf.
template <class V>
int32_t largest_bits(const float* values, int64_t count, int32_t bits) {
  using Int = typename Lanes<V::kWidth>::Int;
  Int best[4] = {};
  int64_t i = 0;
  for (; i + 4 * V::kWidth <= count; i += 4 * V::kWidth) {
    for (int v = 0; v < 4; ++v) {
      const Int x = Lanes<V::kWidth>::template read<Int>(values + i + v * V::kWidth) & bits;
      best[v] = x > best[v] ? x : best[v];
    }
  }
  int32_t most = 0;
  for (int lane = 0; lane < 4 * V::kWidth; ++lane)
    most = std::max(most, best[lane / V::kWidth][lane % V::kWidth]);
  for (; i < count; ++i) {
    int32_t x;
    std::memcpy(&x, values + i, sizeof x);
    most = std::max(most, x & bits);
  }
  return most;
}

template <class V>
void held_scores(const HeldScores& s) {
  const int32_t bits = s.magnitudes ? 0x7fffffff : -1;
  const int32_t most = largest_bits<V>(s.scores, s.count, bits);
  float largest;
  std::memcpy(&largest, &most, sizeof largest);
  const float floor = s.share * std::max(largest, s.share);
  const float* scores = s.scores;
  const auto* kept = reinterpret_cast<const uint8_t*>(s.kept);
  float* __restrict out = s.out;
  const int64_t count = s.count;
  // Left to the compiler, which widens bytes better than it converts vectors of them.
  for (int64_t i = 0; i < count; ++i) {
    int32_t word;
    std::memcpy(&word, scores + i, sizeof word);
    word &= bits;
    float score;
    std::memcpy(&score, &word, sizeof score);
    const float raised = score < floor ? floor : score;  // NaN stays
    out[i] = kept[i] ? raised : 0.0f;
  }
}

}  // namespace fxprune
