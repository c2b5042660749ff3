// Tile-wise GEMM on row-major activations: vectors run along output features, activations are
// broadcast.
//
// Register tile: up to V::kRowVecs vectors of output features x as many rows of x as leave
// V::kAccumulators sums; the narrower the tile, the more rows. A wider tile is cut into strips,
// which share the index list. All strips of a unit pass over a few rows of x before the next rows
// come: those stay in L1, the weights in L2 (row_major_grid cuts units so), x and out stream by.
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
  // Of a single row there are sums for more features at once, which then are read as they lie.
  static constexpr int kMostVecs = std::max(kVecs, std::min(V::kAccumulators, 64 / kW));
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
    const int64_t k = s.k, ldx = s.ldx,
                  ldw = s.ldw;  // locals: a store to out could change what s refers to
    const float *x0 = s.x, *w = s.w;
    const int32_t* index = s.index;
    Reg acc[Rows][Vecs];
    FXPRUNE_UNROLL
    for (int v = 0; v < Vecs; ++v) {
      const Reg start = s.bias ? load(s.bias, v) : V::zero();
      FXPRUNE_UNROLL
      for (int r = 0; r < Rows; ++r) acc[r][v] = start;
    }
    for (int64_t i = 0; i < k; ++i, w += ldw) {
      const float* x = x0 + index[i];
      Reg weight[Vecs];
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v) weight[v] = load(w, v);
      FXPRUNE_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const Reg value = V::set1(x[r * ldx]);
        FXPRUNE_UNROLL
        for (int v = 0; v < Vecs; ++v) acc[r][v] = V::fma(weight[v], value, acc[r][v]);
      }
    }
    const int64_t ldo = s.ldo;
    if (const float* residual = s.residual) {
      FXPRUNE_UNROLL
      for (int r = 0; r < Rows; ++r) {
        FXPRUNE_UNROLL
        for (int v = 0; v < Vecs; ++v) acc[r][v] = V::add(acc[r][v], load(residual + r * ldo, v));
      }
    }
    const Reg low = V::set1(s.clamp.low), high = V::set1(s.clamp.high);
    float* out = s.out;
    FXPRUNE_UNROLL
    for (int r = 0; r < Rows; ++r) {
      float* to = out + r * ldo;
      FXPRUNE_UNROLL
      for (int v = 0; v + 1 < Vecs; ++v)
        V::store(to + v * kW, V::min(high, V::max(low, acc[r][v])));
      V::store(to + (Vecs - 1) * kW, tail, V::min(high, V::max(low, acc[r][Vecs - 1])));
    }
  }

  using Kernel = void (*)(const Strip&);

  template <int Vecs, int... I>
  static constexpr std::array<Kernel, kMaxRows> row_table(std::integer_sequence<int, I...>) {
    return {{&strip<Vecs, std::min(I + 1, rows_of(Vecs))>...}};
  }

  template <int... I>
  static constexpr std::array<std::array<Kernel, kMaxRows>, sizeof...(I)> table(
      std::integer_sequence<int, I...>) {
    return {{row_table<I + 1>(std::make_integer_sequence<int, kMaxRows>())...}};
  }

  // A window of output features with kept columns among others. Sums are computed side by side;
  // this spreads them to their places and completes every feature of the window, kept or not, with
  // bias, residual and activation.
  static constexpr int kMaxSegments = 16;  // vectors of one pass over a window

  struct Spread {
    uint32_t kept[kMaxSegments];  // lanes of each vector that are kept columns
    int64_t from[kMaxSegments];   // its first sum
  };

  // Describes features [begin, end), at most kMaxSegments vectors; `column` is the strip's next
  // kept column so far.
  static int64_t describe(const int32_t* columns, int64_t count, int64_t column, int64_t begin,
                          int64_t end, Spread* to) {
    for (int64_t f = begin, i = 0; f < end; f += kW, ++i) {
      to->kept[i] = 0;
      to->from[i] = column;
      for (; column < count && columns[column] < f + kW; ++column)
        to->kept[i] |= 1u << (columns[column] - f);
    }
    return column;
  }

  static void complete(const TileGemm& a, const Spread& spread, const float* sums, int64_t row,
                       int64_t begin, int64_t end) {
    const Clamp clamp = clamp_of(a.activation);
    const Reg low = V::set1(clamp.low), high = V::set1(clamp.high);
    float* out = a.out + row * a.n;
    const float* residual = a.residual ? a.residual + row * a.n : nullptr;
    for (int64_t f = begin, i = 0; f < end; f += kW, ++i) {
      const auto mask = V::first(end - f);
      Reg y = V::expand(sums + spread.from[i], spread.kept[i]);
      if (a.bias) y = V::add(y, V::load(a.bias + f, mask));
      if (residual) y = V::add(y, V::load(residual + f, mask));
      V::store(out + f, mask, V::min(high, V::max(low, y)));
    }
    if (!is_clamp(a.activation)) activate<V>(a.activation, out + begin, end - begin);
  }

  // A strip and its window of output features [from, to), of which `features` are kept columns.
  struct Piece {
    Strip strip;
    const int32_t* columns;
    int64_t features, from, to;
    int vecs;
    bool whole;     // every feature of the window is kept
    Spread spread;  // of the window, where one pass is enough
  };

  static constexpr int64_t kReach = kMaxSegments * kW;
  static constexpr int kPieces = 16;  // that share a pass over x

  static Piece piece(const TileGemm& a, const Strip& strip, const int32_t* columns,
                     int64_t features, int64_t from, int64_t to) {
    Piece p;
    p.strip = strip;
    p.columns = columns, p.features = features, p.from = from, p.to = to;
    p.vecs = static_cast<int>(std::max<int64_t>((features + kW - 1) / kW, 1));
    p.whole = features == to - from;
    p.strip.ldx = a.k;
    p.strip.ldo = p.whole ? a.n : kStrip;
    p.strip.tail = features - (p.vecs - 1) * kW;
    p.strip.clamp = clamp_of(p.whole ? a.activation : Activation::kNone);
    p.strip.bias = p.whole && a.bias ? a.bias + from : nullptr;
    if (!p.whole && to - from <= kReach) describe(columns, features, 0, from, to, &p.spread);
    return p;
  }

  // At most kMaxRows rows [begin, end).
  static void rows(const TileGemm& a, Piece* p, int64_t begin, int64_t end) {
    static constexpr auto kKernels = table(std::make_integer_sequence<int, kMostVecs>());
    alignas(
        64) float sums[kMaxRows * kStrip + kW];  // expand() may load a vector from the last sum on
    Strip& s = p->strip;
    const int64_t most = rows_of(p->vecs), from = p->from, to = p->to;
    for (int64_t row = begin; row < end; row += most) {
      const int64_t here = std::min(most, end - row), at = row * a.n + from;
      s.x = a.x + row * a.k;
      s.residual = p->whole && a.residual ? a.residual + at : nullptr;
      s.out = p->whole ? a.out + at : sums;
      if (p->features > 0) kKernels[p->vecs - 1][here - 1](s);
      if (p->whole) {
        for (int64_t r = 0; r < here && !is_clamp(a.activation); ++r)
          activate<V>(a.activation, s.out + r * a.n, p->features);
        continue;
      }
      int64_t column = 0;
      for (int64_t f = from; f < to; f += kReach) {
        const int64_t stop = std::min(f + kReach, to);
        if (to - from > kReach)
          column = describe(p->columns, p->features, column, f, stop, &p->spread);
        for (int64_t r = 0; r < here; ++r)
          complete(a, p->spread, sums + r * kStrip, row + r, f, stop);
      }
    }
  }

  static void pass(const TileGemm& a, Piece* pieces, int count, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += kMaxRows) {
      for (int i = 0; i < count; ++i)
        rows(a, pieces + i, row, std::min<int64_t>(row + kMaxRows, end));
    }
  }
};

template <class V>
void tile_gemm_row_major(const TileGemm& a, const TileSpan& span, float*) {
  using M = RowMajor<V>;
  const int64_t end = a.features_to(span.tile_end);
  int64_t from = a.features_from(span.tile_begin);
  typename M::Piece pieces[M::kPieces];
  int count = 0;
  const auto add = [&](const typename M::Piece& piece) {
    pieces[count++] = piece;
    if (count < M::kPieces && piece.to < end) return;
    M::pass(a, pieces, count, span.begin, span.end);
    count = 0;
  };
  const int64_t most = span.end - span.begin == 1 ? M::kMostVecs * M::kW : M::kStrip;
  typename M::Strip s{};
  for (int64_t t = span.tile_begin; t < span.tile_end; ++t) {
    const int64_t start = a.tile_ptr[t], width = a.width(t);
    s.index = a.index + start;
    s.k = a.tile_ptr[t + 1] - start;
    s.ldw = width;
    for (int64_t f = 0; f < width; f += most) {
      // A strip completes the features up to the next strip's first column.
      const int64_t column = t * a.granularity + f, features = std::min<int64_t>(most, width - f);
      const bool last = f + features == width && t + 1 == span.tile_end;
      const int64_t to = last ? end : a.columns[column + features];
      s.w = a.values + start * a.granularity + f;
      add(M::piece(a, s, a.columns + column, features, from, to));
      from = to;
    }
  }
  if (from < end) add(M::piece(a, s, a.columns, 0, from, end));
}

}  // namespace fxprune
