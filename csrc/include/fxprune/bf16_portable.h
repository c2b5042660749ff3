// What vectors without 16-bit shuffles do with rows of bfloat16, in plain C++.
#pragma once

#include <cstdint>

#include "fxprune/bf16.h"

namespace fxprune {

template <class V>
struct PortableBf16 {
  static constexpr bool kDotsPairs = false;
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
  // Rows k of a panel from the 32 x 32 square from[ld r + k].
  static void panel_square(const Bf16* from, int64_t ld, Bf16* to) {
    V::transpose_bf16(from, ld, to);
  }
  // The pixels among the first 16 of a line of sums are those below kFirstHalf, and maybe others.
  static constexpr int64_t kFirstHalf = 16;
  // to[2 i] = low's pixel i, to[2 i + 1] = high's, for 32 i: the order of a line's sums.
  static void interleave(const Bf16* low, const Bf16* high, Bf16* to) {
    for (int64_t i = 0; i < 32; ++i) {
      to[2 * i] = low[i];
      to[2 * i + 1] = high[i];
    }
  }
  // The same, reading the first n pixels alone.
  static void interleave(const Bf16* low, const Bf16* high, int64_t n, Bf16* to) {
    for (int64_t i = 0; i < 32; ++i) {
      to[2 * i] = i < n ? low[i] : Bf16{0};
      to[2 * i + 1] = i < n ? high[i] : Bf16{0};
    }
  }
  // to[i] = from[Stride i], 0 where the input lane's bit is not set, for the first n of a vector's
  // i.
  template <int Stride>
  static void plane_lanes(const Bf16* from, uint32_t mask, int64_t n, Bf16* to) {
    for (int64_t i = 0; i < V::kWidth && i < n; ++i)
      to[i] = mask >> (Stride * i) & 1 ? from[Stride * i] : Bf16{0};
  }
  // to[32 k + r] = from[ld r + k] of a 32 x 32 square.
  static void transpose_bf16(const Bf16* from, int64_t ld, Bf16* to) {
    for (int64_t r = 0; r < 32; ++r) {
      for (int64_t k = 0; k < 32; ++k) to[32 * k + r] = from[ld * r + k];
    }
  }
  // Lines of 32 pixels. lanes: which of a plane's pixels they are (BlockLanes).
  struct Line {
    Bf16 lane[32];
  };
  static Line load_line(const Bf16* p) {
    Line line;
    for (int64_t i = 0; i < 32; ++i) line.lane[i] = p[i];
    return line;
  }
  template <class Lanes>
  static Line load_line(const Bf16* plane, const Lanes& lanes) {
    Line line = {};
    for (int64_t r = 0; r < lanes.count; ++r) {
      for (int64_t i = 0; i < 32; ++i) {
        if (lanes.runs[r].lanes >> i & 1) line.lane[i] = plane[lanes.runs[r].shift + i];
      }
    }
    return line;
  }
  static void store_line(Bf16* p, const Line& line) {
    for (int64_t i = 0; i < 32; ++i) p[i] = line.lane[i];
  }
  template <class Lanes>
  static void store_line(Bf16* plane, const Lanes& lanes, const Line& line) {
    for (int64_t r = 0; r < lanes.count; ++r) {
      for (int64_t i = 0; i < 32; ++i) {
        if (lanes.runs[r].lanes >> i & 1) plane[lanes.runs[r].shift + i] = line.lane[i];
      }
    }
  }
  // end(from + bias), rounded; from: a line of sums, end: a function of a vector.
  template <class Reg, class End>
  static Line line_of(const float* from, Reg bias, const End& end) {
    Line line;
    for (int64_t p = 0; p < 32; p += V::kWidth)
      V::store_bf16(line.lane + p, end(V::add(V::load(from + p), bias)));
    return line;
  }
  // sums += bias + pixels
  template <class Reg>
  static void add_line(const Line& pixels, Reg bias, float* sums) {
    for (int64_t p = 0; p < 32; p += V::kWidth)
      V::store(sums + p, V::add(V::add(V::load(sums + p), bias), V::load_bf16(pixels.lane + p)));
  }
  // Both rounded, as the pairs of a vector's lanes.
  template <class Reg>
  static void store_pairs(Bf16* to, Reg even, Reg odd) {
    Bf16 rounded[2][V::kWidth];
    V::store_bf16(rounded[0], even);
    V::store_bf16(rounded[1], odd);
    for (int i = 0; i < V::kWidth; ++i) to[2 * i] = rounded[0][i], to[2 * i + 1] = rounded[1][i];
  }
  // to[ld p + j] = lines[j][p] + bias[j], clamped, for p < count, j < features <= 32. `square`:
  // 1024 floats of scratch.
  static void store_transposed(const float* const* lines, const float* bias, float low, float high,
                               float* square, Bf16* to, int64_t ld, int64_t features,
                               int64_t count) {
    store_transposed(lines, bias, nullptr, low, high, square, to, ld, features, count);
  }
  // The same with residual[ld p + j] added in float, unless it is null.
  static void store_transposed(const float* const* lines, const float* bias, const Bf16* residual,
                               float low, float high, float* square, Bf16* to, int64_t ld,
                               int64_t features, int64_t count) {
    constexpr int64_t kW = V::kWidth;
    for (int64_t j = 0; j < 32; j += kW) {
      for (int64_t p = 0; p < 32; p += kW) {
        alignas(64) float part[kW * kW];
        for (int64_t i = 0; i < kW; ++i) {
          V::store(part + i * kW, V::add(V::load(lines[j + i] + p), V::set1(bias[j + i])));
        }
        V::transpose(part, kW, square + p * 32 + j, 32);
      }
    }
    for (int64_t p = 0; p < count; ++p) {
      for (int64_t j = 0; j < features; j += kW) {
        auto y = V::load(square + p * 32 + j);
        if (residual) y = V::add(y, V::load_bf16(residual + p * ld + j, features - j));
        y = V::min(V::set1(high), V::max(V::set1(low), y));
        V::store_bf16(to + p * ld + j, features - j, y);
      }
    }
  }
};

}  // namespace fxprune
