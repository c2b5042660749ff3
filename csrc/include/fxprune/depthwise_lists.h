// The kept taps of a channel. Include only under a target pragma.
#pragma once

#include <cstdint>

#include "fxprune/depthwise_taps.h"

namespace fxprune {

// for (KeptTaps tap(a, c); tap; ++tap) finds those of channel c in their order, as *tap.
class KeptTaps {
 public:
  KeptTaps(const DepthwiseShape& a, int64_t c)
      : word_(a.taps + c * a.tap_words), end_(word_ + a.tap_words), bits_(*word_) {
    find();
  }
  explicit operator bool() const { return bits_ != 0; }
  int64_t operator*() const { return first_ + __builtin_ctzll(bits_); }
  void operator++() {
    bits_ &= bits_ - 1;
    find();
  }

 private:
  void find() {
    while (bits_ == 0 && ++word_ < end_) bits_ = *word_, first_ += 64;
  }

  const uint64_t *word_, *end_;
  uint64_t bits_;
  int64_t first_ = 0;
};

}  // namespace fxprune
