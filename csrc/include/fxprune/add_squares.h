// Taylor scores of a stretch of weights: sums[i] += (a[i] * b[i])^2 of `count` floats each.
#pragma once

#include <cstdint>

namespace fxprune {

struct AddSquares {
  float* sums;
  const float* a;
  const float* b;
  int64_t count;
};

}  // namespace fxprune
