// Tile-wise GEMM on feature-major activations: vectors run along pixels, weights are broadcast.
//
// Rows of x are found by their number (kRows) or, for a convolution, through a table of offsets
// (kTaps); then only some lanes of a vector are pixels of the result.
//
// Register tile: up to V::kTileRows output features x V::kTileVecs vectors of pixels, any narrower
// one exact. A wider tile is cut into such strips, which share the index list. The last few pixels
// of an image, where they would leave most of a vector empty (7 x 7 = 3 * 16 + 1), are computed
// with vectors along output features instead. Results do not depend on how the work is cut: a
// pixel's chain of multiply-adds follows from its place in the image.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "fxprune/math.h"
#include "fxprune/tile_gemm.h"
#include "fxprune/unroll.h"

namespace fxprune {

// How a strip finds the rows of x. kFarRows asks for them ahead.
enum class Source { kRows, kFarRows, kTaps };

template <class V>
struct FeatureMajor {
  using Reg = typename V::Reg;
  static constexpr int kRows = V::kTileRows, kVecs = V::kTileVecs, kW = V::kWidth;

  // One strip of a tile over one block of pixels.
  struct Strip {
    const float* x;  // first pixel of the block in row 0
    int64_t ldx;
    const int32_t* table;     // kTaps: offset of each row; ldx is unused
    const PixelLanes* lanes;  // kTaps: of the block's vectors, `to` counted from out
    const char* ahead;        // kTaps: k lines of memory that will be read soon, or null
    const int32_t* index;
    int64_t k;
    const float* w;  // [k][rows], row stride ldw
    int64_t ldw;
    const int32_t* columns;
    const float* bias;      // whole vector or null
    const float* residual;  // at the block's first pixel of feature 0, or null
    float* out;             // same
    int64_t ldr, ldo;       // from feature to feature
    int64_t tail;           // lanes of the last vector that exist
    Activation activation;
  };

  static constexpr int64_t kDistance = 6;  // rows of x asked for ahead

  // Offset of the row of x that belongs to index entry i.
  template <Source S>
  static int64_t row_of(const int32_t* index, const int32_t* table, int64_t ldx, int64_t i) {
    return S == Source::kTaps ? int64_t{table[index[i]]} : index[i] * ldx;
  }

  template <int Rows, int Vecs, Source S>
  static void strip(const Strip& s) {
    const auto tail = V::first(s.tail);
    const int64_t k = s.k, ldx = s.ldx,
                  ldw = s.ldw;  // locals: a store to out could change what s refers to
    const float *x0 = s.x, *w = s.w;
    const int32_t *index = s.index, *columns = s.columns, *table = s.table;
    // Without lines to ask for, the first one of x is asked for: it is there.
    const char* ahead = s.ahead ? s.ahead : reinterpret_cast<const char*>(x0);
    const int64_t line = s.ahead ? 64 : 0;
    Reg acc[Rows][Vecs];
    FXPRUNE_UNROLL
    for (int r = 0; r < Rows; ++r) {
      const Reg start = s.bias ? V::set1(s.bias[columns[r]]) : V::zero();
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v) acc[r][v] = start;
    }
    const auto multiply = [&](auto whole) {
      for (int64_t i = 0; i < k; ++i, w += ldw) {
        const float* row = x0 + row_of<S>(index, table, ldx, i);
        if (S == Source::kFarRows) {
          const float* later = x0 + index[std::min(i + kDistance, k - 1)] * ldx;
          for (int v = 0; v < Vecs; ++v) __builtin_prefetch(later + v * kW);
          __builtin_prefetch(later + Vecs * kW - 1);
        }
        if (S == Source::kTaps) __builtin_prefetch(ahead + i * line, 0, 2);
        Reg x[Vecs];
        FXPRUNE_UNROLL
        for (int v = 0; v + 1 < Vecs; ++v) x[v] = V::load(row + v * kW);
        const float* last = row + (Vecs - 1) * kW;
        x[Vecs - 1] = whole ? V::load(last) : V::load(last, tail);
        FXPRUNE_UNROLL
        for (int r = 0; r < Rows; ++r) {
          const Reg weight = V::set1(w[r]);
          FXPRUNE_UNROLL
          for (int v = 0; v < Vecs; ++v) acc[r][v] = V::fma(weight, x[v], acc[r][v]);
        }
      }
    };
    if (V::kMasksCost && s.tail == kW) {
      multiply(std::true_type());
    } else {
      multiply(std::false_type());
    }
    const int64_t ldr = s.ldr, ldo = s.ldo;
    constexpr int64_t kLast = (Vecs - 1) * kW;
    if (const float* residual = s.residual) {
      FXPRUNE_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const float* from = residual + columns[r] * ldr;
        if (S == Source::kTaps) {
          for (int v = 0; v < Vecs; ++v)
            acc[r][v] = V::add(acc[r][v], V::spread(from + s.lanes[v].to, s.lanes[v].bits));
          continue;
        }
        FXPRUNE_UNROLL
        for (int v = 0; v + 1 < Vecs; ++v) acc[r][v] = V::add(acc[r][v], V::load(from + v * kW));
        acc[r][Vecs - 1] = V::add(acc[r][Vecs - 1], V::load(from + kLast, tail));
      }
    }
    float* out = s.out;
    end_sums<V>(s.activation, acc);
    FXPRUNE_UNROLL
    for (int r = 0; r < Rows; ++r) {
      float* to = out + columns[r] * ldo;
      if (S == Source::kTaps) {
        FXPRUNE_UNROLL
        for (int v = 0; v < Vecs; ++v) {
          const PixelLanes lanes = s.lanes[v];
          V::compress(to + lanes.to, lanes.bits, acc[r][v]);
        }
        continue;
      }
      FXPRUNE_UNROLL
      for (int v = 0; v + 1 < Vecs; ++v) V::store(to + v * kW, acc[r][v]);
      V::store(to + kLast, tail, acc[r][Vecs - 1]);
    }
  }

  using Kernel = void (*)(const Strip&);

  // Most vectors of pixels beside `rows` output features: few of those leave room for more sums.
  static constexpr int kMostVecs = 8;
  static constexpr int vecs_of(int rows) {
    return rows > 4 ? kVecs : std::clamp(V::kAccumulators / rows, kVecs, kMostVecs);
  }

  template <Source S, int... I>
  static constexpr std::array<Kernel, sizeof...(I)> table(std::integer_sequence<int, I...>) {
    return {
        {&strip<I / kMostVecs + 1, std::min(I % kMostVecs + 1, vecs_of(I / kMostVecs + 1)), S>...}};
  }

  // The strip of `rows` output features and `vecs` vectors, at most vecs_of(rows).
  template <Source S>
  static Kernel kernel(int rows, int vecs) {
    static constexpr auto kKernels = table<S>(std::make_integer_sequence<int, kRows * kMostVecs>());
    return kKernels[(rows - 1) * kMostVecs + vecs - 1];
  }

  template <int... I>
  static constexpr std::array<Kernel, sizeof...(I)> prefetching_table(
      std::integer_sequence<int, I...>) {
    return {{&strip<kRows, I + 1, Source::kFarRows>...}};
  }

  // The last Pixels of an image: lanes are the strip's output features. Several chains of sums hide
  // the latency of a multiply-add, which a single one per pixel would not.
  template <int Pixels, Source S>
  static void edge(const Strip& s, int rows) {
    constexpr int kChains = Pixels == 1 ? 8 : Pixels == 2 ? 4 : 2;
    const auto mask = V::first(rows);
    const int64_t k = s.k, ldx = s.ldx, ldw = s.ldw;
    Reg acc[Pixels][kChains];
    FXPRUNE_UNROLL
    for (int p = 0; p < Pixels; ++p) {
      FXPRUNE_UNROLL
      for (int c = 0; c < kChains; ++c) acc[p][c] = V::zero();
    }
    const float* w = s.w;
    int64_t i = 0;
    for (; i + kChains <= k; i += kChains) {
      FXPRUNE_UNROLL
      for (int c = 0; c < kChains; ++c, w += ldw) {
        const Reg weight = V::load(w, mask);
        const float* x = s.x + row_of<S>(s.index, s.table, ldx, i + c);
        FXPRUNE_UNROLL
        for (int p = 0; p < Pixels; ++p) acc[p][c] = V::fma(weight, V::set1(x[p]), acc[p][c]);
      }
    }
    for (; i < k; ++i, w += ldw) {
      const Reg weight = V::load(w, mask);
      const float* x = s.x + row_of<S>(s.index, s.table, ldx, i);
      FXPRUNE_UNROLL
      for (int p = 0; p < Pixels; ++p) acc[p][0] = V::fma(weight, V::set1(x[p]), acc[p][0]);
    }
    alignas(64) float y[kW];
    const Clamp clamp = clamp_of(s.activation);
    FXPRUNE_UNROLL
    for (int p = 0; p < Pixels; ++p) {
      Reg sum = acc[p][0];
      FXPRUNE_UNROLL
      for (int c = 1; c < kChains; ++c) sum = V::add(sum, acc[p][c]);
      V::store(y, sum);
      for (int r = 0; r < rows; ++r) {
        const int64_t feature = s.columns[r];
        if (s.bias) y[r] += s.bias[feature];
        if (s.residual) y[r] += s.residual[feature * s.ldr + p];
        y[r] = y[r] < clamp.low ? clamp.low : y[r] > clamp.high ? clamp.high : y[r];
      }
      if (!is_clamp(s.activation)) activate<V>(s.activation, y, rows);
      for (int r = 0; r < rows; ++r) s.out[s.columns[r] * s.ldo + p] = y[r];
    }
  }

  template <Source S>
  static constexpr std::array<void (*)(const Strip&, int), 2> edges() {
    return {{&edge<1, S>, &edge<2, S>}};
  }

  static constexpr int kMostEdge = kW >= 8 ? 2 : 0;
  static constexpr int kEdgeRows = std::max(kRows, std::min(kW, 8));  // of a strip of such pixels
  // Pixels of an image computed by edge(): all, or those that follow its full vectors.
  static int64_t edge_pixels(int64_t m, int64_t granularity) {
    const int64_t most = std::min<int64_t>(kMostEdge, granularity);  // lanes are output features
    return (m > kW || m <= most) && m % kW <= most ? m % kW : 0;
  }

  // A strip over `pixels` pixels from `pixel` on, with everything set that does not depend on the
  // tile.
  static Strip strip_at(const TileGemm& a, int64_t image, int64_t pixel, int64_t pixels) {
    Strip s{};
    s.x = a.x + image * a.k * a.ldx() + pixel;
    s.ldx = a.ldx(), s.ldr = a.ldr(), s.ldo = a.ldo();
    s.bias = a.bias;
    s.residual = a.residual ? a.residual + image * a.n * a.ldr() + pixel : nullptr;
    s.out = a.out + image * a.n * a.ldo() + pixel;
    s.tail = (pixels - 1) % kW + 1;
    s.activation = a.activation;
    return s;
  }

  // Calls f(strip, rows) for each strip of the span's tiles, then for each output feature that no
  // column covers, which is a strip without input features. `values` points at the weights of the
  // span's first tile. Fills `s` in place: a copy would wait for the results that are being stored.
  // Rows: the most output features of a strip.
  template <int Rows = kRows, class F>
  static void each_strip(const TileGemm& a, const TileSpan& span, const float* values, Strip& s,
                         const F& f) {
    const int64_t origin = a.tile_ptr[span.tile_begin];
    for (int64_t t = span.tile_begin; t < span.tile_end; ++t) {
      const int64_t start = a.tile_ptr[t], width = a.width(t);
      s.index = a.index + start;
      s.k = a.tile_end[t] - start;
      s.ldw = width;
      for (int64_t r = 0; r < width; r += Rows) {
        s.w = values + (start - origin) * a.granularity + r;
        s.columns = a.columns + t * a.granularity + r;
        f(s, static_cast<int>(std::min<int64_t>(Rows, width - r)));
      }
    }
    if (a.kept == a.n) return;
    int64_t column = a.first_column(span.tile_begin);
    const int64_t end = a.features_to(span.tile_end);
    s.k = 0;
    for (int64_t feature = a.features_from(span.tile_begin); feature < end; ++feature) {
      if (column < a.kept && a.columns[column] == feature) {
        ++column;
        continue;
      }
      const int32_t gap = static_cast<int32_t>(feature);
      s.columns = &gap;
      f(s, 1);
    }
  }

  // Applies an activation that strips leave to pixels [begin, end) of the span's features: in long
  // runs, because every few vectors would wait for those before them.
  static void finish(const TileGemm& a, const TileSpan& span, int64_t begin, int64_t end) {
    if (ends_in_registers(a.activation)) return;
    float* out = a.out + span.image * a.n * a.ldo() + begin;
    const int64_t to = a.features_to(span.tile_end);
    for (int64_t feature = a.features_from(span.tile_begin); feature < to; ++feature)
      activate<V>(a.activation, out + feature * a.ldo(), end - begin);
  }

  // Weights of the span's tiles times the image's gate.
  static void scale(const TileGemm& a, const TileSpan& span, float* to) {
    const float* gate = a.gate + span.image * a.k;
    to -= a.tile_ptr[span.tile_begin] * a.granularity;
    for (int64_t t = span.tile_begin; t < span.tile_end; ++t) {
      const int64_t width = a.width(t), start = a.tile_ptr[t] * a.granularity;
      const float* from = a.values + start;
      float* scaled = to + start;
      const auto first = V::first(width);
      for (int64_t i = a.tile_ptr[t]; i < a.tile_end[t]; ++i, from += width, scaled += width) {
        const Reg factor = V::set1(gate[a.index[i]]);
        V::store(scaled, first, V::mul(V::load(from, first), factor));
        for (int64_t j = kW; j < width; ++j) scaled[j] = from[j] * gate[a.index[i]];
      }
    }
  }
};

// `scratch`: as many floats as there are packed weights when there is a gate, else unused.
template <class V>
void tile_gemm_feature_major(const TileGemm& a, const TileSpan& span, float* scratch) {
  using M = FeatureMajor<V>;
  static constexpr auto kPrefetching =
      M::prefetching_table(std::make_integer_sequence<int, M::kVecs>());
  const float* values = a.values + a.tile_ptr[span.tile_begin] * a.granularity;
  if (a.gate) {
    M::scale(a, span, scratch);
    values = scratch;
  }
  const int64_t edge = span.end * M::kW >= a.m ? M::edge_pixels(a.m, a.granularity) : 0;
  const int64_t vecs = span.end - span.begin - (edge > 0),
                most = M::vecs_of(static_cast<int>(std::min<int64_t>(a.granularity, M::kRows))),
                blocks = (vecs + most - 1) / most;
  // The first strip of a block brings the block's pixels into the near caches. Where they come from
  // beyond L2 it asks for them ahead: rows of an index list are no pattern that the hardware would
  // follow.
  const bool far = a.batch * a.k * a.m > 256 * 1024;
  int64_t first = span.begin;
  for (int64_t b = 0; b < blocks; ++b) {
    const int here = static_cast<int>(vecs / blocks + (b < vecs % blocks));
    const int64_t pixel = first * M::kW;
    auto s = M::strip_at(a, span.image, pixel, std::min<int64_t>(here * M::kW, a.m - pixel));
    bool prefetch = far;
    M::each_strip(a, span, values, s, [&](const typename M::Strip& strip, int rows) {
      (prefetch && rows == M::kRows ? kPrefetching[here - 1]
                                    : M::template kernel<Source::kRows>(rows, here))(strip);
      prefetch = false;
    });
    first += here;
  }
  M::finish(a, span, span.begin * M::kW, std::min(span.end * M::kW, a.m - edge));
  if (edge > 0) {
    static constexpr auto kEdges = M::template edges<Source::kRows>();
    auto s = M::strip_at(a, span.image, a.m - edge, edge);
    M::template each_strip<M::kEdgeRows>(
        a, span, values, s,
        [&](const typename M::Strip& strip, int rows) { kEdges[edge - 1](strip, rows); });
  }
}

}  // namespace fxprune
