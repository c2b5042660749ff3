// Tile-wise GEMM on feature-major activations: vectors run along pixels, weights are broadcast.
//
// Register tile: up to V::kTileRows output features x V::kTileVecs vectors of pixels, any narrower one exact. A wider
// tile is cut into such strips, which share the index list. Results do not depend on how pixels are blocked: every
// output is one chain of multiply-adds in the order of the index list.
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
struct FeatureMajor {
  using Reg = typename V::Reg;
  static constexpr int kRows = V::kTileRows, kVecs = V::kTileVecs, kW = V::kWidth;

  // One strip of a tile over one block of pixels.
  struct Strip {
    const float* x;  // first pixel of the block in row 0
    int64_t ldx;
    const int32_t* index;
    int64_t k;
    const float* w;  // [k][rows], row stride ldw
    int64_t ldw;
    const int32_t* columns;
    const float* bias;      // whole vector or null
    const float* residual;  // at the block's first pixel of feature 0, or null
    float* out;             // same
    int64_t ldo;
    int64_t tail;  // lanes of the last vector that exist
    Clamp clamp;
    Activation activation;
  };

  template <int Rows, int Vecs>
  static void strip(const Strip& s) {
    const auto tail = V::first(s.tail);
    Reg acc[Rows][Vecs];
    FXPRUNE_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const Reg start = s.bias ? V::set1(s.bias[s.columns[r]]) : V::zero();
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v) acc[r][v] = start;
    }
    const float* w = s.w;
    for (int64_t i = 0; i < s.k; ++i, w += s.ldw) {
      const float* row = s.x + s.index[i] * s.ldx;
      Reg x[Vecs];
      FXPRUNE_UNROLL
      for (int v = 0; v + 1 < Vecs; ++v) x[v] = V::load(row + v * kW);
      x[Vecs - 1] = V::load(row + (Vecs - 1) * kW, tail);
      FXPRUNE_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const Reg weight = V::set1(w[r]);
        FXPRUNE_UNROLL
        for (int v = 0; v < Vecs; ++v) acc[r][v] = V::fma(weight, x[v], acc[r][v]);
      }
    }
    const Reg low = V::set1(s.clamp.low), high = V::set1(s.clamp.high);
    FXPRUNE_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const int64_t at = s.columns[r] * s.ldo;
      FXPRUNE_UNROLL
      for (int v = 0; v + 1 < Vecs; ++v) {
        Reg y = acc[r][v];
        if (s.residual) y = V::add(y, V::load(s.residual + at + v * kW));
        V::store(s.out + at + v * kW, V::min(high, V::max(low, y)));
      }
      constexpr int64_t kLast = (Vecs - 1) * kW;
      Reg y = acc[r][Vecs - 1];
      if (s.residual) y = V::add(y, V::load(s.residual + at + kLast, tail));
      V::store(s.out + at + kLast, tail, V::min(high, V::max(low, y)));
      if (!is_clamp(s.activation)) activate<V>(s.activation, s.out + at, kLast + s.tail);
    }
  }

  using Kernel = void (*)(const Strip&);

  template <int... I>
  static constexpr std::array<Kernel, sizeof...(I)> table(std::integer_sequence<int, I...>) {
    return {{&strip<I / kVecs + 1, I % kVecs + 1>...}};
  }

  // Copies the block's pixels of every input feature to consecutive rows, times the gate. Strips then read aligned
  // cache lines of few pages, however long the rows of x are.
  static void pack(const float* x, int64_t ldx, const float* gate, int64_t k, int vecs, int64_t tail, float* panel) {
    const auto mask = V::first(tail);
    for (int64_t i = 0; i < k; ++i, x += ldx, panel += kVecs * kW) {
      const Reg scale = V::set1(gate ? gate[i] : 1.0f);
      for (int v = 0; v + 1 < vecs; ++v) V::store(panel + v * kW, V::mul(scale, V::load(x + v * kW)));
      V::store(panel + (vecs - 1) * kW, V::mul(scale, V::load(x + (vecs - 1) * kW, mask)));
    }
  }

  // Output features of [begin, end) that no column covers: act(bias + residual).
  static void fill_gaps(const TileGemm& a, Strip s, int vecs, int64_t begin, int64_t end, int64_t column) {
    static constexpr auto kKernels = table(std::make_integer_sequence<int, kVecs>());
    s.k = 0;
    for (int64_t f = begin; f < end; ++f) {
      if (column < a.kept && a.columns[column] == f) {
        ++column;
        continue;
      }
      const int32_t feature = static_cast<int32_t>(f);
      s.columns = &feature;
      kKernels[vecs - 1](s);
    }
  }

  static void block(const TileGemm& a, const TileSpan& span, int64_t first, int vecs, float* panel) {
    static constexpr auto kKernels = table(std::make_integer_sequence<int, kRows * kVecs>());
    const int64_t pixel = first * kW, pixels = std::min<int64_t>(vecs * kW, a.m - pixel);
    Strip s;
    s.x = a.x + span.image * a.k * a.m + pixel;
    s.ldx = a.m;
    s.bias = a.bias;
    s.residual = a.residual ? a.residual + span.image * a.n * a.m + pixel : nullptr;
    s.out = a.out + span.image * a.n * a.m + pixel;
    s.ldo = a.m;
    s.tail = pixels - (vecs - 1) * kW;
    s.clamp = clamp_of(a.activation);
    s.activation = a.activation;
    if (panel) {
      pack(s.x, s.ldx, a.gate ? a.gate + span.image * a.k : nullptr, a.k, vecs, s.tail, panel);
      s.x = panel;
      s.ldx = kVecs * kW;
    }
    for (int64_t t = span.tile_begin; t < span.tile_end; ++t) {
      const int64_t start = a.tile_ptr[t], width = a.width(t);
      s.index = a.index + start;
      s.k = a.tile_ptr[t + 1] - start;
      s.ldw = width;
      for (int64_t r = 0; r < width; r += kRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kRows, width - r));
        s.w = a.values + start * a.granularity + r;
        s.columns = a.columns + t * a.granularity + r;
        kKernels[(rows - 1) * kVecs + vecs - 1](s);
      }
    }
    if (a.kept < a.n) {
      fill_gaps(a, s, vecs, a.features_from(span.tile_begin), a.features_to(span.tile_end),
                a.first_column(span.tile_begin));
    }
  }
};

// `panel`: null, or k * V::kTileVecs * V::kWidth floats for a packed copy of x; needed when there is a gate.
template <class V>
void tile_gemm_feature_major(const TileGemm& a, const TileSpan& span, float* panel) {
  const int64_t vecs = span.end - span.begin, blocks = (vecs + V::kTileVecs - 1) / V::kTileVecs;
  int64_t first = span.begin;
  for (int64_t b = 0; b < blocks; ++b) {
    const int here = static_cast<int>(vecs / blocks + (b < vecs % blocks));
    FeatureMajor<V>::block(a, span, first, here, panel);
    first += here;
  }
}

}  // namespace fxprune
