// The last part of a GEMM whose K is split: adds what each part of K came to.
#pragma once

#include <cstdint>

#include "fxprune/math.h"
#include "fxprune/tile_gemm.h"

namespace fxprune {

// Elements [begin, end) of out = act(sum over parts + residual), in the order of the parts.
template <class V>
void partial_sums(const PartialSums& a, int64_t begin, int64_t end) {
  const Clamp clamp = clamp_of(a.activation);
  const auto low = V::set1(clamp.low), high = V::set1(clamp.high);
  for (int64_t i = begin; i < end; i += V::kWidth) {
    const auto lanes = V::first(end - i);
    auto sum = V::load(a.sums + i, lanes);
    for (int64_t p = 1; p < a.parts; ++p)
      sum = V::add(sum, V::load(a.sums + p * a.stride + i, lanes));
    if (a.residual) sum = V::add(sum, V::load(a.residual + i, lanes));
    V::store(a.out + i, lanes, V::min(high, V::max(low, sum)));
  }
  if (!is_clamp(a.activation)) activate<V>(a.activation, a.out + begin, end - begin);
}

}  // namespace fxprune
