// Tile-wise GEMM through a panel, for tiles too narrow to fill registers on their own: granularity
// 1 is a sparse matrix by output feature (CSR), which is what unstructured and n:m weights run as.
//
//   panel[k][P] = x of P pixels or rows (times the gate)     copied or transposed once per block
//   sums[f][P]  = bias + panel rows of the feature's index list, weighted     for kChunk features
//   out         = act(sums + residual)                       copied or transposed back
//
// Elements: several features, each with its own index list, share a pass, so that there are enough
// sums to hide the latency of a multiply-add; K is walked in parts that fit L1. Wider tiles run the
// strips of the feature-major kernel on the panel. A pixel's chain of multiply-adds follows the
// index list alone, so results do not depend on how the work is cut.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "fxprune/math.h"
#include "fxprune/tile_gemm.h"
#include "fxprune/tile_gemm_feature_major.h"
#include "fxprune/unroll.h"

namespace fxprune {

template <class V>
struct Panel {
  using Reg = typename V::Reg;
  using Wide = FeatureMajor<V>;
  static constexpr int kW = V::kWidth, kVecs = kPanelVecs, kMostLines = 4;
  static constexpr int64_t kNear = 8 * 1024;  // floats of a panel's part that stays in L1

  // One output feature: what is left of its index list.
  struct Line {
    const int32_t* index;
    const float* w;
    const int32_t* end;
  };

  // Features of one pass over a panel of `vecs` vectors.
  static constexpr int lines_of(int vecs) {
    const int sums = std::min(V::kAccumulators, 16);
    return vecs * 4 <= sums ? 4 : vecs * 2 <= sums ? 2 : 1;
  }

  // Adds to `Lines` rows of sums the input features below `limit`.
  template <int Lines, int Vecs>
  static void accumulate(Line* line, const float* panel, float* sums, int32_t limit) {
    constexpr int64_t kP = Vecs * kW;
    Reg acc[Lines][Vecs];
    int64_t count[Lines], common = 0;
    FXPRUNE_UNROLL
    for (int l = 0; l < Lines; ++l) {
      count[l] = below(line[l].index, line[l].end, limit);
      common = l == 0 ? count[0] : std::min(common, count[l]);
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v) acc[l][v] = V::load(sums + l * kP + v * kW);
    }
    for (int64_t i = 0; i < common; ++i) {
      FXPRUNE_UNROLL
      for (int l = 0; l < Lines; ++l) {
        const float* x = panel + line[l].index[i] * kP;
        const Reg weight = V::set1(line[l].w[i]);
        FXPRUNE_UNROLL
        for (int v = 0; v < Vecs; ++v) acc[l][v] = V::fma(weight, V::load(x + v * kW), acc[l][v]);
      }
    }
    FXPRUNE_UNROLL
    for (int l = 0; l < Lines; ++l) {
      for (int64_t i = common; i < count[l]; ++i) {
        const float* x = panel + line[l].index[i] * kP;
        const Reg weight = V::set1(line[l].w[i]);
        FXPRUNE_UNROLL
        for (int v = 0; v < Vecs; ++v) acc[l][v] = V::fma(weight, V::load(x + v * kW), acc[l][v]);
      }
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v) V::store(sums + l * kP + v * kW, acc[l][v]);
      line[l].index += count[l];
      line[l].w += count[l];
    }
  }

  // How many entries of an increasing list are below `limit`.
  static int64_t below(const int32_t* from, const int32_t* end, int32_t limit) {
    const int32_t* at = from;
    for (int64_t hits = kW; hits == kW; at += hits)
      hits = V::below(at, std::min<int64_t>(end - at, kW), limit);
    return at - from;
  }

  using Kernel = void (*)(Line*, const float*, float*, int32_t);

  template <int... I>
  static constexpr std::array<std::array<Kernel, 2>, kVecs> table(
      std::integer_sequence<int, I...>) {
    return {{{{&accumulate<1, I + 1>, &accumulate<lines_of(I + 1), I + 1>}}...}};
  }

  // Tiles [begin, end) of granularity 1 into their sums, which hold the bias.
  static void elements(const TileGemm& a, int64_t begin, int64_t end, const float* panel, int vecs,
                       float* sums) {
    static constexpr auto kKernels = table(std::make_integer_sequence<int, kVecs>());
    const int64_t width = vecs * kW, part = std::max<int64_t>(kNear / width, 32);
    const int64_t parts = std::max<int64_t>(1, (a.k + part - 1) / part), count = end - begin;
    Line lines[kPanelChunk];
    for (int64_t l = 0; l < count; ++l) {
      const int64_t start = a.tile_ptr[begin + l];
      lines[l] = {a.index + start, a.values + start, a.index + a.tile_ptr[begin + l + 1]};
    }
    const int64_t together = lines_of(vecs);
    for (int64_t p = 1; p <= parts; ++p) {
      const int32_t limit = static_cast<int32_t>(a.k * p / parts);
      int64_t l = 0;
      for (; l + together <= count; l += together)
        kKernels[vecs - 1][1](lines + l, panel, sums + l * width, limit);
      for (; l < count; ++l) kKernels[vecs - 1][0](lines + l, panel, sums + l * width, limit);
    }
  }

  // Wider tiles into their sums. bias: of the chunk's features in order, or null.
  static void tiles(const TileGemm& a, int64_t begin, int64_t end, const float* panel, int vecs,
                    const float* bias, float* sums) {
    int32_t order[kPanelChunk];
    for (int32_t i = 0; i < kPanelChunk; ++i) order[i] = i;
    typename Wide::Strip s{};
    s.ldx = s.ldo = vecs * kW;
    s.bias = bias;
    s.activation = Activation::kNone;
    s.tail = kW;
    const int64_t most =
        Wide::vecs_of(static_cast<int>(std::min<int64_t>(a.granularity, Wide::kRows)));
    for (int64_t first = 0; first < vecs; first += most) {
      const int64_t here = std::min<int64_t>(most, vecs - first);
      s.x = panel + first * kW;
      s.out = sums + first * kW;
      for (int64_t t = begin; t < end; ++t) {
        const int64_t start = a.tile_ptr[t], width = a.width(t);
        s.index = a.index + start;
        s.k = a.tile_ptr[t + 1] - start;
        s.ldw = width;
        for (int64_t r = 0; r < width; r += Wide::kRows) {
          s.w = a.values + start * a.granularity + r;
          s.columns = order + (t - begin) * a.granularity + r;
          Wide::template kernel<fxprune::Source::kRows>(
              static_cast<int>(std::min<int64_t>(Wide::kRows, width - r)),
              static_cast<int>(here))(s);
        }
      }
    }
  }

  // Where the results of output features [from, to) are: rows of sums, or the bias of a feature
  // that no column covers.
  struct Source {
    const float* at;
    int64_t step;  // 1, or 0 for the bias
  };

  static Source source(const TileGemm& a, int64_t feature, int64_t first, int64_t last,
                       int64_t* column, const float* sums, int64_t width) {
    static constexpr float kZero = 0.0f;
    if (*column < last && a.columns[*column] == feature) {
      return {sums + ((*column)++ - first) * width, 1};
    }
    return {a.bias ? a.bias + feature : &kZero, 0};
  }

  // Feature-major: pixels [pixel, pixel + count) of an image.
  static void load_pixels(const TileGemm& a, int64_t image, int64_t pixel, int64_t count, int vecs,
                          float* panel) {
    const float* gate = a.gate ? a.gate + image * a.k : nullptr;
    const auto tail = V::first(count - (vecs - 1) * kW);
    const float* from = a.x + image * a.k * a.m + pixel;
    for (int64_t k = 0; k < a.k; ++k, from += a.m, panel += vecs * kW) {
      const Reg factor = V::set1(gate ? gate[k] : 1.0f);
      for (int v = 0; v < vecs; ++v) {
        const Reg x = v + 1 < vecs ? V::load(from + v * kW) : V::load(from + v * kW, tail);
        V::store(panel + v * kW, gate ? V::mul(factor, x) : x);
      }
    }
  }

  static void store_pixels(const TileGemm& a, int64_t image, int64_t pixel, int64_t count, int vecs,
                           int64_t begin, int64_t end, const float* sums) {
    const int64_t first = a.first_column(begin), last = a.first_column(end), width = vecs * kW;
    const Clamp clamp = clamp_of(a.activation);
    const Reg low = V::set1(clamp.low), high = V::set1(clamp.high);
    const auto tail = V::first(count - (vecs - 1) * kW);
    int64_t column = first;
    for (int64_t f = a.features_from(begin); f < a.features_to(end); ++f) {
      const Source from = source(a, f, first, last, &column, sums, width);
      const int64_t at = (image * a.n + f) * a.m + pixel;
      for (int v = 0; v < vecs; ++v) {
        const bool whole = v + 1 < vecs;
        Reg y = from.step ? V::load(from.at + v * kW) : V::set1(*from.at);
        if (const float* residual = a.residual ? a.residual + at + v * kW : nullptr)
          y = V::add(y, whole ? V::load(residual) : V::load(residual, tail));
        y = V::min(high, V::max(low, y));
        if (whole) {
          V::store(a.out + at + v * kW, y);
        } else {
          V::store(a.out + at + v * kW, tail, y);
        }
      }
      if (!is_clamp(a.activation)) activate<V>(a.activation, a.out + at, count);
    }
  }

  // Row-major: rows [row, row + count), transposed in squares.
  static void load_rows(const TileGemm& a, int64_t row, int64_t count, int vecs, float* panel) {
    const int64_t width = vecs * kW;
    for (int64_t r = 0; r < width; r += kW) {
      const int64_t rows = std::clamp<int64_t>(count - r, 0, kW);
      const float* from = a.x + (row + r) * a.k;
      for (int64_t k = 0; k < a.k; k += kW) {
        const int64_t deep = std::min<int64_t>(kW, a.k - k);
        float* to = panel + k * width + r;
        if (rows == kW && deep == kW) {
          V::transpose(from + k, a.k, to, width);
          continue;
        }
        for (int64_t i = 0; i < deep; ++i) {
          for (int64_t j = 0; j < kW; ++j)
            to[i * width + j] = j < rows ? from[j * a.k + k + i] : 0.0f;
        }
      }
    }
  }

  static void store_rows(const TileGemm& a, int64_t row, int64_t count, int vecs, int64_t begin,
                         int64_t end, const float* sums) {
    const int64_t first = a.first_column(begin), last = a.first_column(end), width = vecs * kW;
    const Clamp clamp = clamp_of(a.activation);
    const Reg low = V::set1(clamp.low), high = V::set1(clamp.high);
    alignas(64) float square[kW * kW] = {};
    Source from[kW];
    int64_t column = first;
    const int64_t to = a.features_to(end);
    for (int64_t f = a.features_from(begin); f < to; f += kW) {
      const int64_t features = std::min<int64_t>(kW, to - f);
      bool dense = features == kW;
      for (int64_t j = 0; j < features; ++j) {
        from[j] = source(a, f + j, first, last, &column, sums, width);
        dense &= from[j].step == 1;
      }
      const auto mask = V::first(features);
      for (int64_t r = 0; r < count; r += kW) {
        if (dense) {
          V::transpose(from[0].at + r, width, square, kW);
        } else {
          for (int64_t j = 0; j < features; ++j) {
            for (int64_t i = 0; i < kW; ++i)
              square[i * kW + j] = from[j].at[(r + i) * from[j].step];
          }
        }
        for (int64_t i = 0; i < std::min<int64_t>(kW, count - r); ++i) {
          const int64_t at = (row + r + i) * a.n + f;
          Reg y = V::load(square + i * kW);
          if (a.residual) y = V::add(y, V::load(a.residual + at, mask));
          V::store(a.out + at, mask, V::min(high, V::max(low, y)));
          if (!is_clamp(a.activation)) activate<V>(a.activation, a.out + at, features);
        }
      }
    }
  }

  // One block: load(panel) and store(tiles, sums) are the layout's.
  template <class Load, class Store>
  static void block(const TileGemm& a, const TileSpan& span, int vecs, float* scratch,
                    const Load& load, const Store& store) {
    const int64_t width = vecs * kW, each = std::max<int64_t>(1, kPanelChunk / a.granularity);
    float *panel = scratch, *sums = scratch + a.k * width;
    load(panel);
    int64_t begin = span.tile_begin;
    do {
      const int64_t end = std::min(begin + each, span.tile_end);
      const int64_t first = a.first_column(begin), count = a.first_column(end) - first;
      float bias[kPanelChunk] = {};
      for (int64_t i = 0; i < count && a.bias; ++i) bias[i] = a.bias[a.columns[first + i]];
      if (a.granularity == 1) {
        for (int64_t i = 0; i < count; ++i) std::fill_n(sums + i * width, width, bias[i]);
        elements(a, begin, end, panel, vecs, sums);
      } else {
        tiles(a, begin, end, panel, vecs, bias, sums);
      }
      store(begin, end, sums);
      begin = end;
    } while (begin < span.tile_end);
  }
};

// A span of pixels in vectors. `scratch`: panel_scratch floats.
template <class V>
void tile_gemm_panel_feature_major(const TileGemm& a, const TileSpan& span, float* scratch) {
  using M = Panel<V>;
  const int64_t count = span.end - span.begin, blocks = (count + M::kVecs - 1) / M::kVecs;
  int64_t first = span.begin;
  for (int64_t b = 0; b < blocks; ++b) {
    const int vecs = static_cast<int>(count / blocks + (b < count % blocks));
    const int64_t pixel = first * M::kW, pixels = std::min<int64_t>(vecs * M::kW, a.m - pixel);
    M::block(
        a, span, vecs, scratch,
        [&](float* panel) { M::load_pixels(a, span.image, pixel, pixels, vecs, panel); },
        [&](int64_t begin, int64_t end, const float* sums) {
          M::store_pixels(a, span.image, pixel, pixels, vecs, begin, end, sums);
        });
    first += vecs;
  }
}

// A span of rows. `scratch`: panel_scratch floats.
template <class V>
void tile_gemm_panel_row_major(const TileGemm& a, const TileSpan& span, float* scratch) {
  using M = Panel<V>;
  const int64_t most = M::kVecs * M::kW;
  for (int64_t row = span.begin; row < span.end; row += most) {
    const int64_t rows = std::min(most, span.end - row);
    const int vecs = static_cast<int>((rows + M::kW - 1) / M::kW);
    M::block(
        a, span, vecs, scratch, [&](float* panel) { M::load_rows(a, row, rows, vecs, panel); },
        [&](int64_t begin, int64_t end, const float* sums) {
          M::store_rows(a, row, rows, vecs, begin, end, sums);
        });
  }
}

}  // namespace fxprune
