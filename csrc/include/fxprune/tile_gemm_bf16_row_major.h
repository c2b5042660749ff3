// Row-major tile-wise GEMM in bfloat16.
//
//   panel[k][32] = x of a block of 32 rows, transposed, in the order that V::interleave takes
//   out          = act(sums + bias + residual), rounded and transposed
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/tile_gemm_bf16.h"

namespace fxprune {

template <class V>
struct TileRowsBf16 : TileBf16<V> {
  using M = TileBf16<V>;
  using M::kMost;
  using M::kSquare;
  using M::kW;
  using typename M::Reg;

  // Writes whole squares, up to kDeep rows more than x has input features.
  static void pack_rows(const TileGemmBf16& a, int64_t row, int64_t count, Bf16* panel) {
    constexpr int64_t kAhead = 3 * kDeep;  // input features asked for ahead
    alignas(64) Bf16 square[kPixels * kDeep];
    for (int64_t k = 0; k < a.k; k += kDeep) {
      const Bf16* from = a.x + row * a.k + k;
      const int64_t deep = std::min(kDeep, a.k - k);
      for (int64_t r = 0; r < count; ++r) __builtin_prefetch(from + r * a.k + kAhead);
      if (count == kPixels && deep == kDeep) {
        V::panel_square(from, a.k, panel + k * kPixels);
        continue;
      }
      for (int64_t r = 0; r < kPixels; ++r)
        V::copy_bf16(from + (r < count ? r * a.k : 0), r < count ? deep : 0, square + r * kDeep);
      V::panel_square(square, kDeep, panel + k * kPixels);
    }
  }

  // Rows of sums as columns of the result: features [from, to), of which `columns` are computed.
  static void store_rows(const TileGemmBf16& a, int64_t row, int64_t count, const int32_t* columns,
                         int64_t features, int64_t from, int64_t to, const float* sums,
                         float* square) {
    alignas(64) static constexpr float kNothing[kMost] = {};
    const bool smooth = !is_clamp(a.activation);
    int64_t column = 0;
    for (int64_t f = from; f < to; f += kMost) {
      const int64_t here = std::min(kMost, to - f);
      const float* lines[kMost];
      float bias[kMost];
      if (here == kMost && features == to - from) {  // the common case, without a branch a feature
        for (int64_t j = 0; j < kMost; ++j) lines[j] = sums + (f - from + j) * kPixels;
        std::copy_n(a.bias ? a.bias + f : kNothing, kMost, bias);
      } else {
        // Which features are kept is no pattern that a branch could be predicted from.
        for (int64_t j = 0; j < kMost; ++j) {
          const int64_t next = column < features ? columns[column] : a.n;
          const bool kept = next == f + j && j < here;
          lines[j] = kept ? sums + column * kPixels : kNothing;
          column += kept;
          bias[j] = a.bias && j < here ? a.bias[f + j] : 0.0f;
        }
      }
      const Clamp clamp = clamp_of(a.activation);
      Bf16* out = a.out + row * a.n + f;
      if (a.residual && !smooth) {
        V::store_transposed(lines, bias, a.residual + row * a.n + f, clamp.low, clamp.high,
                            square + kSquare, out, a.n, here, count);
        continue;
      }
      if (smooth) {
        add(a, row, count, f, here, lines, bias, square);
        activate<V>(a.activation, square, kSquare);
        for (int64_t j = 0; j < kMost; ++j) lines[j] = square + j * kPixels, bias[j] = 0.0f;
      }
      V::store_transposed(lines, bias, clamp.low, clamp.high, square + kSquare, out, a.n, here,
                          count);
    }
  }

  // square[j] = lines[j] + bias[j] + residual of feature f + j.
  static void add(const TileGemmBf16& a, int64_t row, int64_t count, int64_t f, int64_t features,
                  const float* const* lines, const float* bias, float* square) {
    alignas(64) Bf16 rows[kSquare], turned[kSquare];
    if (a.residual) {
      const Bf16* from = a.residual + row * a.n + f;
      for (int64_t r = 0; r < kPixels; ++r)
        V::copy_bf16(from + (r < count ? r * a.n : 0), r < count ? features : 0, rows + r * kMost);
      V::transpose_bf16(rows, kMost, turned);
    }
    for (int64_t j = 0; j < kMost; ++j) {
      const Reg shift = V::set1(bias[j]);
      for (int64_t p = 0; p < kPixels; p += kW) {
        Reg y = V::add(V::load(lines[j] + p), shift);
        if (a.residual) y = V::add(y, V::load_bf16(turned + j * kPixels + p));
        V::store(square + j * kPixels + p, y);
      }
    }
  }
};

// Results of a span of rows, by blocks of 32.
template <class V>
struct RowOutput {
  const TileGemmBf16& a;
  float* square;

  int64_t count(int64_t block) const { return std::min(kPixels, a.m - block * kPixels); }
  int64_t halves(int64_t block) const { return count(block) > kPixels / 2 ? 2 : 1; }
  void hold(int64_t, int64_t) {}
  void ask(int64_t block, const int32_t*, int64_t, int64_t from) const {
    const Bf16* out = a.out + block * kPixels * a.n + from;
    for (int64_t r = 0; r < count(block); ++r) __builtin_prefetch(out + r * a.n, 1);
  }
  void store(int64_t block, const int32_t* columns, int64_t features, int64_t from, int64_t to,
             const float* sums) const {
    TileRowsBf16<V>::store_rows(a, block * kPixels, count(block), columns, features, from, to, sums,
                                square);
  }
};

// A span of blocks of 32 rows of x.
template <class V>
void tile_gemm_bf16_row_major(const TileGemmBf16& a, const TileSpan& span, float* scratch) {
  using M = TileRowsBf16<V>;
  const auto room = M::room(a, scratch);
  RowOutput<V> output{a, room.square};
  const auto pack = [&](int64_t block, Bf16* panel) {
    M::pack_rows(a, block * kPixels, output.count(block), panel);
  };
  Panels<V, decltype(pack)> source{a, room.panels, pack};
  M::run(a, span, bf16_group(a), room, source, output);
}

}  // namespace fxprune
