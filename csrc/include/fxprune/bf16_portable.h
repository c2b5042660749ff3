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
  // A row of a panel: the first n pixels in their order, then zeros.
  static void panel_row(const Bf16* p, int64_t n, Bf16* to) { V::copy_bf16(p, n, to); }
  // Rows k of a panel from the 32 x 32 square from[ld r + k].
  static void panel_square(const Bf16* from, int64_t ld, Bf16* to) {
    V::transpose_bf16(from, ld, to);
  }
  // to[2 i] = low's pixel i, to[2 i + 1] = high's, for 32 i.
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
  // to[0 .. 32) = from + bias, clamped.
  template <class Reg>
  static void store_line(const float* from, Reg bias, Reg low, Reg high, Bf16* to) {
    for (int64_t p = 0; p < 32; p += V::kWidth)
      V::store_bf16(to + p, V::min(high, V::max(low, V::add(V::load(from + p), bias))));
  }
  // to[ld p + j] = lines[j][p] + bias[j], clamped, for p < count, j < features <= 32. `square`:
  // 1024 floats of scratch.
  static void store_transposed(const float* const* lines, const float* bias, float low, float high,
                               float* square, Bf16* to, int64_t ld, int64_t features,
                               int64_t count) {
    constexpr int64_t kW = V::kWidth;
    for (int64_t j = 0; j < 32; j += kW) {
      for (int64_t p = 0; p < 32; p += kW) {
        alignas(64) float part[kW * kW];
        for (int64_t i = 0; i < kW; ++i) {
          const auto y = V::add(V::load(lines[j + i] + p), V::set1(bias[j + i]));
          V::store(part + i * kW, V::min(V::set1(high), V::max(V::set1(low), y)));
        }
        V::transpose(part, kW, square + p * 32 + j, 32);
      }
    }
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t j = 0; j < features; j += kW)
        V::store_bf16(to + p * ld + j, features - j, V::load(square + p * 32 + j));
    }
  }
};

}  // namespace fxprune
