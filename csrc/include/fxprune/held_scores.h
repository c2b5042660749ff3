// Scores of weights some of which are pruned: 0 for those, at least `share` of the largest for all
// others.
//
//   out[i] = kept[i] ? max(s[i], share * max(largest s, share)) : 0, s = scores or their magnitudes
#pragma once

#include <cstdint>

namespace fxprune {

struct HeldScores {
  const float* scores;
  const bool* kept;
  float* out;
  int64_t count;
  float share;
  bool magnitudes;
};

}  // namespace fxprune
