// What vectors without 16-bit shuffles do with rows of bfloat16, in plain C++.
#pragma once

#include <cstdint>

#include "fxprune/bf16.h"

namespace fxprune {

template <class V>
struct PortableBf16 {
  // The first n lanes, 0 elsewhere.
  template <class Count>
  static auto load_bf16(const Bf16* p, Count n) {
    Bf16 lanes[V::kWidth] = {};
    for (Count i = 0; i < n && i < V::kWidth; ++i) lanes[i] = p[i];
    return V::load_bf16(lanes);
  }
  template <class Reg>
  static void store_bf16(Bf16* p, int64_t n, Reg a) {
    Bf16 lanes[V::kWidth];
    V::store_bf16(lanes, a);
    for (int64_t i = 0; i < n && i < V::kWidth; ++i) p[i] = lanes[i];
  }
  // to[0 .. 32) = p[0 .. n), then zeros.
  static void copy_bf16(const Bf16* p, int64_t n, Bf16* to) {
    for (int64_t i = 0; i < 32; ++i) to[i] = i < n ? p[i] : Bf16{0};
  }
  // to[2 i] = low[i], to[2 i + 1] = high[i] for 32 i.
  static void interleave(const Bf16* low, const Bf16* high, Bf16* to) {
    for (int64_t i = 0; i < 32; ++i) {
      to[2 * i] = low[i];
      to[2 * i + 1] = high[i];
    }
  }
  // to[32 k + r] = from[ld r + k] of a 32 x 32 square.
  static void transpose_bf16(const Bf16* from, int64_t ld, Bf16* to) {
    for (int64_t r = 0; r < 32; ++r) {
      for (int64_t k = 0; k < 32; ++k) to[32 * k + r] = from[ld * r + k];
    }
  }
};

}  // namespace fxprune
