// The kernel of fxprune::add_squares. Its rate is that of memory: three streams in, one out.
// Include only under a target pragma.
#pragma once

#include <cstdint>
#include <cstring>

#include "fxprune/add_squares.h"
#include "fxprune/lanes.h"

namespace fxprune {

template <class V>
void add_squares(const AddSquares& s, int64_t first, int64_t last) {
  using L = Lanes<V::kWidth>;
  int64_t i = first;
  for (; i + V::kWidth <= last; i += V::kWidth) {
    const auto product =
        L::template read<typename L::Float>(s.a + i) * L::template read<typename L::Float>(s.b + i);
    const auto sum = L::template read<typename L::Float>(s.sums + i) + product * product;
    std::memcpy(s.sums + i, &sum, sizeof sum);
  }
  for (; i < last; ++i) {
    const float product = s.a[i] * s.b[i];
    s.sums[i] += product * product;
  }
}

}  // namespace fxprune
