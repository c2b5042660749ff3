// The kept taps of a channel. Include only under a target pragma.
#pragma once

#include <cstdint>

#include "fxprune/depthwise_taps.h"

namespace fxprune {

// Calls f(t) for the kept taps t of channel c, in their order.
template <class F>
void each_tap(const DepthwiseShape& a, int64_t c, const F& f) {
  for (int64_t word = 0; word < a.tap_words; ++word) {
    for (uint64_t bits = a.taps[c * a.tap_words + word]; bits; bits &= bits - 1)
      f(word * 64 + __builtin_ctzll(bits));
  }
}

}  // namespace fxprune
