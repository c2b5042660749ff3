// Tile-wise GEMM on row-major activations: vectors run along output features, activations are broadcast.
//
// Register tile: up to V::kRowVecs vectors of output features x as many rows of x as leave V::kAccumulators sums; the
// narrower the tile, the more rows. A wider tile is cut into strips, which share the index list.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "fxprune/math.h"
#include "fxprune/tile_gemm.h"
#include "fxprune/unroll.h"

namespace fxprune {

template <class V>
struct RowMajor {
  using Reg = typename V::Reg;
  static constexpr int kVecs = V::kRowVecs, kW = V::kWidth, kStrip = kVecs * kW, kMaxRows = 12;
  static constexpr int rows_of(int vecs) { return std::min(V::kAccumulators / vecs, kMaxRows); }

  struct Strip {
    const float* x;  // first row of the block
    int64_t ldx;
    const int32_t* index;
    int64_t k;
    const float* w;  // [k][features], row stride ldw
    int64_t ldw;
    const float* bias;      // of the strip's features, or null
    const float* residual;  // at the strip's first feature, or null
    float* out;             // same
    int64_t ldo;
    int64_t tail;  // lanes of the last vector that exist
    Clamp clamp;
  };

  template <int Vecs, int Rows>
  static void strip(const Strip& s) {
    const auto tail = V::first(s.tail);
    const auto load = [tail](const float* p, int v) {
      return v + 1 < Vecs ? V::load(p + v * kW) : V::load(p + v * kW, tail);
    };
    Reg acc[Rows][Vecs];
    FXPRUNE_UNROLL
    for (int v = 0; v < Vecs; ++v) {
      const Reg start = s.bias ? load(s.bias, v) : V::zero();
      FXPRUNE_UNROLL
      for (int r = 0; r < Rows; ++r) acc[r][v] = start;
    }
    const float* w = s.w;
    for (int64_t i = 0; i < s.k; ++i, w += s.ldw) {
      const float* x = s.x + s.index[i];
      Reg weight[Vecs];
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v) weight[v] = load(w, v);
      FXPRUNE_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const Reg value = V::set1(x[r * s.ldx]);
        FXPRUNE_UNROLL
        for (int v = 0; v < Vecs; ++v) acc[r][v] = V::fma(weight[v], value, acc[r][v]);
      }
    }
    const Reg low = V::set1(s.clamp.low), high = V::set1(s.clamp.high);
    FXPRUNE_UNROLL
    for (int r = 0; r < Rows; ++r) {
      float* out = s.out + r * s.ldo;
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v) {
        Reg y = acc[r][v];
        if (s.residual) y = V::add(y, load(s.residual + r * s.ldo, v));
        y = V::min(high, V::max(low, y));
        if (v + 1 < Vecs) {
          V::store(out + v * kW, y);
        } else {
          V::store(out + v * kW, tail, y);
        }
      }
    }
  }

  using Kernel = void (*)(const Strip&);

  template <int Vecs, int... I>
  static constexpr std::array<Kernel, kMaxRows> row_table(std::integer_sequence<int, I...>) {
    return {{&strip<Vecs, std::min(I + 1, rows_of(Vecs))>...}};
  }

  template <int... I>
  static constexpr std::array<std::array<Kernel, kMaxRows>, kVecs> table(std::integer_sequence<int, I...>) {
    return {{row_table<I + 1>(std::make_integer_sequence<int, kMaxRows>())...}};
  }

  // Rows [begin, end) of one strip of `features` output features, in blocks of near-equal height.
  static void rows(const TileGemm& a, Strip s, int64_t begin, int64_t end, int64_t features, const int32_t* columns) {
    static constexpr auto kKernels = table(std::make_integer_sequence<int, kVecs>());
    const int vecs = static_cast<int>((features + kW - 1) / kW);
    s.tail = features - (vecs - 1) * kW;
    const bool adjacent = columns[features - 1] - columns[0] + 1 == features;
    alignas(64) float bias[kStrip], sums[kMaxRows * kStrip], residual[kMaxRows * kStrip];
    if (!adjacent && a.bias) {
      for (int64_t f = 0; f < features; ++f) bias[f] = a.bias[columns[f]];
    }
    s.bias = !a.bias ? nullptr : adjacent ? a.bias + columns[0] : bias;
    const int64_t count = end - begin, most = rows_of(vecs), blocks = (count + most - 1) / most;
    int64_t row = begin;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t here = count / blocks + (b < count % blocks), at = row * a.n;
      s.x = a.x + row * a.k;
      if (adjacent) {
        s.residual = a.residual ? a.residual + at + columns[0] : nullptr;
        s.out = a.out + at + columns[0];
        s.ldo = a.n;
        kKernels[vecs - 1][here - 1](s);
        if (!is_clamp(a.activation)) {
          for (int64_t r = 0; r < here; ++r) activate<V>(a.activation, s.out + r * a.n, features);
        }
      } else {
        // Scattered columns: compute in a compact buffer, then scatter.
        if (a.residual) {
          for (int64_t r = 0; r < here; ++r) {
            for (int64_t f = 0; f < features; ++f) residual[r * kStrip + f] = a.residual[at + r * a.n + columns[f]];
          }
        }
        s.residual = a.residual ? residual : nullptr;
        s.out = sums;
        s.ldo = kStrip;
        kKernels[vecs - 1][here - 1](s);
        for (int64_t r = 0; r < here; ++r) {
          if (!is_clamp(a.activation)) activate<V>(a.activation, sums + r * kStrip, features);
          float* out = a.out + at + r * a.n;
          for (int64_t f = 0; f < features; ++f) out[columns[f]] = sums[r * kStrip + f];
        }
      }
      row += here;
    }
  }

  // Output features of [begin, end) that no column covers: act(bias + residual).
  static void fill_gaps(const TileGemm& a, const TileSpan& span) {
    const int64_t begin = a.features_from(span.tile_begin), end = a.features_to(span.tile_end);
    const Clamp clamp = clamp_of(a.activation);
    for (int64_t row = span.begin; row < span.end; ++row) {
      int64_t column = a.first_column(span.tile_begin);
      for (int64_t f = begin; f < end; ++f) {
        if (column < a.kept && a.columns[column] == f) {
          ++column;
          continue;
        }
        float y = a.bias ? a.bias[f] : 0.0f;
        if (a.residual) y += a.residual[row * a.n + f];
        y = y < clamp.low ? clamp.low : y > clamp.high ? clamp.high : y;
        if (!is_clamp(a.activation)) activate<V>(a.activation, &y, 1);
        a.out[row * a.n + f] = y;
      }
    }
  }
};

template <class V>
void tile_gemm_row_major(const TileGemm& a, const TileSpan& span, float*) {
  constexpr int64_t kStrip = RowMajor<V>::kStrip;
  for (int64_t t = span.tile_begin; t < span.tile_end; ++t) {
    const int64_t start = a.tile_ptr[t], width = a.width(t);
    typename RowMajor<V>::Strip s;
    s.ldx = a.k;
    s.index = a.index + start;
    s.k = a.tile_ptr[t + 1] - start;
    s.ldw = width;
    s.clamp = clamp_of(a.activation);
    for (int64_t f = 0; f < width; f += kStrip) {
      s.w = a.values + start * a.granularity + f;
      RowMajor<V>::rows(a, s, span.begin, span.end, std::min(kStrip, width - f), a.columns + t * a.granularity + f);
    }
  }
  if (a.kept < a.n) RowMajor<V>::fill_gaps(a, span);
}

}  // namespace fxprune
