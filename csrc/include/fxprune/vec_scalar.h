// Portable vectors of 4 floats: plain C++ that any compiler turns into whatever the base ISA has.
#pragma once

#include <cmath>
#include <cstdint>

#include "fxprune/bf16_portable.h"
#include "fxprune/lists_portable.h"

namespace fxprune {

struct Scalar : PortableBf16<Scalar>, PortableLists<Scalar> {
  static constexpr int kWidth = 4;
  static constexpr int kAccumulators = 8;
  static constexpr int kTileRows = 4;
  static constexpr int kTileVecs = 2;
  static constexpr int kRowVecs = 2;
  static constexpr bool kMasksCost = false;

  typedef float Reg __attribute__((vector_size(16)));
  using Mask = uint32_t;

  static Reg zero() { return Reg{0, 0, 0, 0}; }
  static Reg set1(float a) { return Reg{a, a, a, a}; }
  static Reg load(const float* p) { return Reg{p[0], p[1], p[2], p[3]}; }
  static Reg load(const float* p, Mask m) {
    return Reg{m & 1 ? p[0] : 0, m & 2 ? p[1] : 0, m & 4 ? p[2] : 0, m & 8 ? p[3] : 0};
  }
  static void store(float* p, Reg a) {
    for (int i = 0; i < 4; ++i) p[i] = a[i];
  }
  static void store(float* p, Mask m, Reg a) {
    for (int i = 0; i < 4; ++i) {
      if (m >> i & 1) p[i] = a[i];
    }
  }
  static Reg add(Reg a, Reg b) { return a + b; }
  static Reg sub(Reg a, Reg b) { return a - b; }
  static Reg mul(Reg a, Reg b) { return a * b; }
  static Reg div(Reg a, Reg b) { return a / b; }
  static Reg ratio(Reg a, Reg b) { return div(a, b); }
  static Reg sixth(Reg a) { return div(a, set1(6.0f)); }
  static Reg fma(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg fma_load(Reg a, const float* p, Mask m, Reg c) { return fma(a, load(p, m), c); }
  static Reg max(Reg a, Reg b) { return a > b ? a : b; }  // NaN in b is returned
  static Reg min(Reg a, Reg b) { return a < b ? a : b; }
  static float sum(Reg a) { return (a[0] + a[2]) + (a[1] + a[3]); }
  // max that returns a NaN of either
  static Reg highest(Reg a, Reg b) { return a != a ? a : max(a, b); }

  // How many of the first n <= kWidth integers are below `limit`.
  static int64_t below(const int32_t* p, int64_t n, int32_t limit) {
    int64_t hits = 0;
    for (int64_t i = 0; i < n; ++i) hits += p[i] < limit;
    return hits;
  }
  // to[j][i] = from[i][j] of a kWidth x kWidth square.
  static void transpose(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
    for (int i = 0; i < kWidth; ++i) {
      for (int j = 0; j < kWidth; ++j) to[j * ld_to + i] = from[i * ld_from + j];
    }
  }

  static Reg expand(const float* p, uint32_t b) {
    float lanes[kWidth];
    for (int i = 0; i < kWidth; ++i) lanes[i] = b >> i & 1 ? *p++ : 0.0f;
    return load(lanes);
  }
  static Reg spread(const float* p, uint32_t b) { return expand(p, b); }
  static void compress(float* p, uint32_t b, Reg a) {
    for (int i = 0; i < kWidth; ++i) {
      if (b >> i & 1) *p++ = a[i];
    }
  }
  static Mask bits(uint32_t b) { return b & 15u; }
  static Mask first(int64_t n) { return n >= 4 ? 15u : (1u << n) - 1u; }
  static Reg load_even(const float* p, uint32_t b) {
    return Reg{b & 1 ? p[0] : 0, b & 4 ? p[2] : 0, b & 16 ? p[4] : 0, b & 64 ? p[6] : 0};
  }

  // ---- bfloat16: what PortableBf16 leaves ----

  using PortableBf16<Scalar>::load_bf16;
  using PortableBf16<Scalar>::store_bf16;
  static Reg load_bf16(const Bf16* p) {
    return Reg{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
  }
  static void store_bf16(Bf16* p, Reg a) {
    for (int i = 0; i < 4; ++i) p[i] = narrow(a[i]);
  }

  struct Pairs {
    Reg low, high;
  };
  static constexpr int kPairRows = 2, kPairVecs = 2;
  static Pairs load_pairs(const Bf16* p) {
    return {Reg{widen(p[0]), widen(p[2]), widen(p[4]), widen(p[6])},
            Reg{widen(p[1]), widen(p[3]), widen(p[5]), widen(p[7])}};
  }
  static Pairs set1_pairs(const Bf16* p) { return {set1(widen(p[0])), set1(widen(p[1]))}; }
  static Reg dot(Pairs a, Pairs b, Reg c) { return fma(a.high, b.high, fma(a.low, b.low, c)); }
};

}  // namespace fxprune
