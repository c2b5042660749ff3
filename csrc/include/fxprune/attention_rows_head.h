// Attention in float32 on row-major activations. Keys and values of a head are packed into strips
// of the register tile of tile_gemm_row_major.h, whose products then are
//
//   scores[queries][keys] = q  times the transposed keys     out[queries][depth] = p  times v
//
// Include only under a target pragma.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <utility>

#include "fxprune/attention_rows.h"
#include "fxprune/math.h"
#include "fxprune/tile_gemm_row_major.h"
#include "fxprune/unroll.h"

namespace fxprune {

template <class V>
struct AttentionRowsHead {
  using Reg = typename V::Reg;
  using Product = RowMajor<V>;
  static constexpr int64_t kW = V::kWidth, kStrip = Product::kStrip, kBlock = 48;
  static constexpr float kLeast = -std::numeric_limits<float>::max();

  static constexpr int64_t strips(int64_t n) { return (n + kStrip - 1) / kStrip; }
  static int64_t pitch(const AttentionRows& a) { return (a.keys + kW - 1) / kW * kW; }

  // Floats of scratch.
  static int64_t room(const AttentionRows& a) {
    return kBlock * pitch(a) + strips(a.keys) * kStrip * a.depth +
           strips(a.depth) * kStrip * a.keys + std::max(a.keys, a.depth);
  }

  const AttentionRows& a;
  const int64_t ld = pitch(a);
  float *scores, *keys, *values;  // [48][ld], [strip][depth][kStrip], [strip][keys][kStrip]
  int32_t* every;                 // 0, 1, 2 ...: products take all of their rows

  AttentionRowsHead(const AttentionRows& arguments, float* scratch) : a(arguments) {
    scores = scratch;
    keys = scores + kBlock * ld;
    values = keys + strips(a.keys) * kStrip * a.depth;
    every = reinterpret_cast<int32_t*>(values + strips(a.depth) * kStrip * a.keys);
    for (int64_t i = 0; i < std::max(a.keys, a.depth); ++i) every[i] = static_cast<int32_t>(i);
    // no product writes the lanes behind the last key
    for (int64_t r = 0; r < kBlock; ++r)
      std::fill(scores + r * ld + a.keys, scores + (r + 1) * ld,
                -std::numeric_limits<float>::infinity());
  }

  void pack_keys() const {
    alignas(64) float square[kW * kW] = {}, turned[kW * kW];
    for (int64_t j = 0; j < a.keys; j += kW) {
      const int64_t rows = std::min(kW, a.keys - j);
      float* to = keys + j / kStrip * kStrip * a.depth + j % kStrip;
      for (int64_t e = 0; e < a.depth; e += kW) {
        const int64_t lanes = std::min(kW, a.depth - e);
        const float* from = a.k + j * a.k_pitch + e;
        if (rows == kW && lanes == kW) {
          V::transpose(from, a.k_pitch, to + e * kStrip, kStrip);
          continue;
        }
        for (int64_t r = 0; r < rows; ++r)
          V::store(square + r * kW, V::load(from + r * a.k_pitch, V::first(lanes)));
        V::transpose(square, kW, turned, kW);
        for (int64_t r = 0; r < lanes; ++r)
          V::store(to + (e + r) * kStrip, V::load(turned + r * kW));
      }
    }
  }

  void pack_values() const {
    float* to = values;
    for (int64_t e = 0; e < a.depth; e += kStrip) {
      const int64_t end = std::min(e + kStrip, a.depth);
      for (int64_t j = 0; j < a.keys; ++j, to += kStrip) {
        const float* from = a.v + j * a.v_pitch;
        for (int64_t f = e; f < end; f += kW)
          V::store(to + f - e, V::load(from + f, V::first(end - f)));
      }
    }
  }

  // out[rows][columns] = x[rows][depth] times strips[columns / kStrip][depth][kStrip]
  void multiply(const float* x, int64_t ldx, const float* strip, int64_t rows, int64_t depth,
                int64_t columns, float* out, int64_t ldo) const {
    static constexpr auto kKernels =
        Product::table(std::make_integer_sequence<int, Product::kVecs>());
    typename Product::Strip s{};
    s.ldx = ldx, s.index = every, s.k = depth, s.ldw = kStrip, s.ldo = ldo;
    s.clamp = clamp_of(Activation::kNone);
    for (int64_t c = 0; c < columns; c += kStrip, strip += depth * kStrip) {
      const int64_t width = std::min(kStrip, columns - c), vecs = (width + kW - 1) / kW,
                    most = Product::rows_of(static_cast<int>(vecs));
      s.w = strip, s.tail = width - (vecs - 1) * kW;
      for (int64_t row = 0; row < rows; row += most) {
        s.x = x + row * ldx, s.out = out + row * ldo + c;
        kKernels[vecs - 1][std::min(most, rows - row) - 1](s);
      }
    }
  }

  // Makes x = scale * score + mask of a row of scores; returns the largest x, without NaN.
  float scaled(float* row, const float* mask) const {
    const Reg scale = V::set1(a.scale);
    Reg highest = V::set1(kLeast);
    for (int64_t j = 0; j < ld; j += kW) {
      const Reg add = mask ? V::load(mask + j, V::first(a.keys - j)) : V::zero();
      const Reg x = V::fma(V::load(row + j), scale, add);
      highest = V::max(x, highest);
      V::store(row + j, x);
    }
    alignas(64) float lanes[kW];
    V::store(lanes, highest);
    return *std::max_element(lanes, lanes + kW);
  }

  // Makes exp(x - most) of a row; returns the factor that makes shares of them.
  float exponentials(float* row, float most) const {
    const Reg least = V::set1(-most), nothing = V::set1(1.3e-38f);  // above exp's smallest result
    Reg total = V::zero();
    for (int64_t j = 0; j < ld; j += kW) {
      const Reg x = Math<V>::exp(V::add(V::load(row + j), least));
      // a masked key has no share: with a tiny one the sums would be denormal, and slow
      const Reg share = V::max(V::zero(), V::sub(x, nothing));
      total = V::add(total, share);
      V::store(row + j, V::first(a.keys - j), share);
    }
    const float sum = V::sum(total);  // NaN where a score is
    return most > kLeast ? 1.0f / sum : 0.0f * sum;
  }

  void scale_row(float* out, float factor) const {
    const Reg by = V::set1(factor);
    for (int64_t e = 0; e < a.depth; e += kW) {
      const auto lanes = V::first(a.depth - e);
      V::store(out + e, lanes, V::mul(V::load(out + e, lanes), by));
    }
  }

  // Queries [begin, end).
  void run(int64_t begin, int64_t end) const {
    pack_keys();
    pack_values();
    for (int64_t i = begin; i < end; i += kBlock) {
      const int64_t rows = std::min(kBlock, end - i);
      float* out = a.out + i * a.out_pitch;
      float most[kBlock], factor[kBlock];
      multiply(a.q + i * a.q_pitch, a.q_pitch, keys, rows, a.depth, a.keys, scores, ld);
      // row by row twice, so that rows overlap: within one, all lanes wait for their maximum
      for (int64_t r = 0; r < rows; ++r)
        most[r] = scaled(scores + r * ld, a.mask ? a.mask + (i + r) * a.mask_pitch : nullptr);
      for (int64_t r = 0; r < rows; ++r) factor[r] = exponentials(scores + r * ld, most[r]);
      multiply(scores, ld, values, rows, a.keys, a.depth, out, a.out_pitch);
      for (int64_t r = 0; r < rows; ++r) scale_row(out + r * a.out_pitch, factor[r]);
    }
  }
};

template <class V>
int64_t attention_rows_scratch(const AttentionRows& a) {
  return AttentionRowsHead<V>::room(a);
}

template <class V>
void attention_rows(const AttentionRows& a, int64_t begin, int64_t end, float* scratch) {
  AttentionRowsHead<V>(a, scratch).run(begin, end);
}

}  // namespace fxprune
