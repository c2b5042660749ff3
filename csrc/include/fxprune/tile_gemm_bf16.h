// Tile-wise GEMM in bfloat16 with sums in float, for both layouts of the activations.
//
//   panel[k][32]   = x of a block of 32 pixels (or rows), times the gate        once per block;
//                    the pixels in the order that V::interleave takes
//   pairs[k'][32]  = k' of the tile's rows of it, two and two interleaved       for L1
//   sums[G][32]   += the tile's weights times the pairs, two strips at once     PairProducts
//   out            = act(sums + bias + residual), rounded; transposed for row-major
//
// Pruned rows cost nothing, kept ones a copy that the products amortise over the tile's width, so
// wide tiles are fast. The order of a sum follows from the tile's index list alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/math.h"
#include "fxprune/pair_products.h"
#include "fxprune/tile_image.h"
#include "fxprune/unroll.h"

namespace fxprune {

template <class V>
struct TileBf16 {
  using Reg = typename V::Reg;
  static constexpr int kW = V::kWidth;
  static constexpr int64_t kMost = 32;  // output features that are stored at once
  static constexpr int64_t kChunk = 4;  // blocks of input features whose pairs stay in L1
  static constexpr int64_t kSquare = kMost * kPixels;

  // Parts of the scratch (bf16_scratch).
  struct Room {
    Bf16 *panels, *pairs;
    float *sums, *square;
  };

  static Room room(const TileShape& a, float* scratch) {
    Room r;
    r.square = scratch;
    r.sums = r.square + 2 * kSquare;
    r.pairs =
        reinterpret_cast<Bf16*>(r.sums + std::max(image_rows(a.granularity), kMost) * kPixels);
    r.panels = r.pairs + kChunk * kDeep * kPixels;
    return r;
  }

  // ---- panels ----

  static void pack_pixels(const TileGemmBf16& a, int64_t image, int64_t pixel, int64_t count,
                          Bf16* panel) {
    const Bf16* from = a.x + image * a.k * a.m + pixel;
    const Bf16* gate = a.gate ? a.gate + image * a.k : nullptr;
    for (int64_t k = 0; k < a.k; ++k, from += a.m, panel += kPixels) {
      V::panel_row(from, count, panel);
      if (!gate) continue;
      const Reg factor = V::set1(widen(gate[k]));
      for (int64_t p = 0; p < kPixels; p += kW)
        V::store_bf16(panel + p, V::mul(factor, V::load_bf16(panel + p)));
    }
  }

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

  static void gather(const int32_t* index, int64_t count, const Bf16* panel, Bf16* pairs) {
    alignas(64) static constexpr Bf16 kNothing[kPixels] = {};
    const int64_t end = (count + kDeep - 1) / kDeep * kDeep;
    int64_t i = 0;
    for (; i + 1 < count; i += 2)
      V::interleave(panel + index[i] * kPixels, panel + index[i + 1] * kPixels,
                    pairs + i * kPixels);
    for (; i < end; i += 2)
      V::interleave(i < count ? panel + index[i] * kPixels : kNothing, kNothing,
                    pairs + i * kPixels);
  }

  // ---- results ----

  // Rows [0, rows) of sums into the planes of their features.
  static void store_pixels(const TileGemmBf16& a, int64_t image, int64_t pixel, int64_t count,
                           const int32_t* columns, int64_t rows, float* sums) {
    const Clamp clamp = clamp_of(a.activation);
    const Reg low = V::set1(clamp.low), high = V::set1(clamp.high);
    const bool smooth = !is_clamp(a.activation);
    const int64_t whole = count / kW * kW;
    for (int64_t r = 0; r < rows; ++r, sums += kPixels) {
      const int64_t at = (image * a.n + columns[r]) * a.m + pixel;
      const Reg bias = V::set1(a.bias ? a.bias[columns[r]] : 0.0f);
      const Bf16* residual = a.residual ? a.residual + at : nullptr;
      Bf16* out = a.out + at;
      if (smooth) {
        for (int64_t p = 0; p < count; p += kW) {
          Reg y = V::add(V::load(sums + p), bias);
          if (residual) y = V::add(y, V::load_bf16(residual + p, count - p));
          V::store(sums + p, y);
        }
        activate<V>(a.activation, sums, count);
        for (int64_t p = 0; p < count; p += kW)
          V::store_bf16(out + p, count - p, V::load(sums + p));
        continue;
      }
      int64_t p = 0;
      if (count == kPixels && !residual) {
        V::store_line(sums, bias, low, high, out);
        continue;
      }
      for (; p < whole; p += kW) {
        Reg y = V::add(V::load(sums + p), bias);
        if (residual) y = V::add(y, V::load_bf16(residual + p));
        V::store_bf16(out + p, V::min(high, V::max(low, y)));
      }
      if (p < count) {
        Reg y = V::add(V::load(sums + p), bias);
        if (residual) y = V::add(y, V::load_bf16(residual + p, count - p));
        V::store_bf16(out + p, count - p, V::min(high, V::max(low, y)));
      }
    }
  }

  // Rows of sums as columns of the result: features [from, to), of which `columns` are computed.
  static void store_rows(const TileGemmBf16& a, int64_t row, int64_t count, const int32_t* columns,
                         int64_t features, int64_t from, int64_t to, const float* sums,
                         float* square) {
    alignas(64) static constexpr float kNothing[kMost] = {};
    const bool smooth = !is_clamp(a.activation), added = a.residual || smooth;
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
      if (added) {
        add(a, row, count, f, here, lines, bias, square);
        if (smooth) activate<V>(a.activation, square, kSquare);
        for (int64_t j = 0; j < kMost; ++j) lines[j] = square + j * kPixels, bias[j] = 0.0f;
      }
      const Clamp clamp = clamp_of(a.activation);
      V::store_transposed(lines, bias, clamp.low, clamp.high, square + kSquare,
                          a.out + row * a.n + f, a.n, here, count);
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

  // ---- tiles ----

  // A span of blocks, in groups whose panels stay in L2 while every tile passes over them.
  // pack(block, panel) fills one. output.ask(block, columns, features, from) asks for the memory
  // of a result ahead of the products; output.store(block, columns, features, from, to, sums)
  // completes output features [from, to), of which `columns` were computed, for a pair of strips.
  template <class Pack, class Output>
  static void run(const TileGemmBf16& a, const TileSpan& span, const Room& room, const Pack& pack,
                  const Output& output) {
    const Bf16* image = a.values + image_offset(a, span.tile_begin);
    const int64_t group = bf16_group(a);
    PairProducts<V> products;
    for (int64_t begin = span.begin; begin < span.end; begin += group) {
      const int64_t end = std::min(begin + group, span.end);
      for (int64_t b = begin; b < end; ++b) pack(b, room.panels + (b - begin) * a.k * kPixels);
      tiles(a, span, image, begin, end, room, products, output);
    }
  }

  template <class Output>
  static void tiles(const TileGemmBf16& a, const TileSpan& span, const Bf16* image, int64_t begin,
                    int64_t end, const Room& room, PairProducts<V>& products,
                    const Output& output) {
    const int64_t stop = a.features_to(span.tile_end);
    int64_t from = a.features_from(span.tile_begin);
    for (int64_t t = span.tile_begin; t < span.tile_end; ++t) {
      const int64_t start = a.tile_ptr[t], width = a.width(t), depth = image_depth(a, t);
      const int64_t strip = strip_rows(width), padded = image_rows(width);
      const int32_t* columns = a.columns + t * a.granularity;
      const int64_t count = a.tile_ptr[t + 1] - start, stride = depth * strip * kDeep;
      int64_t next = from;
      for (int64_t b = begin; b < end; ++b) {
        const Bf16* panel = room.panels + (b - begin) * a.k * kPixels;
        const int64_t halves = a.m - b * kPixels > kPixels / 2 ? 2 : 1;
        next = from;
        for (int64_t d = 0; d == 0 || d < depth; d += kChunk) {
          const int64_t deep = std::min(kChunk, depth - d), first = d * kDeep;
          gather(a.index + start + first, std::min(deep * kDeep, count - first), panel, room.pairs);
          for (int64_t f = 0; f < padded; f += 2 * strip) {
            const int64_t strips = std::min<int64_t>(2, (padded - f) / strip);
            const int64_t features = std::min(width - f, strips * strip);
            const bool last = f + features == width && t + 1 == span.tile_end;
            const int64_t to = last ? stop : columns[f + features];
            float* sums = room.sums + f * kPixels;
            const bool done = d + kChunk >= depth;
            if (done) output.ask(b, columns + f, features, next);
            products.run(image + f * depth * kDeep + d * strip * kDeep, stride, deep, strip, strips,
                         room.pairs, halves, d > 0, sums);
            if (!done) continue;
            output.store(b, columns + f, features, next, to, sums);
            next = to;
          }
        }
      }
      from = next;
      image += padded * depth * kDeep;
    }
    for (int64_t b = begin; b < end && from < stop; ++b)
      output.store(b, a.columns, 0, from, stop, room.sums);
  }
};

// Floats of scratch that a unit of `blocks` blocks needs.
template <class V>
int64_t bf16_scratch(const TileShape& a, int64_t blocks) {
  using M = TileBf16<V>;
  const int64_t pairs = M::kChunk * kDeep * kPixels,
                panels = (std::min(blocks, bf16_group(a)) * a.k + kDeep) * kPixels;
  return 2 * M::kSquare + std::max(image_rows(a.granularity), M::kMost) * kPixels +
         (pairs + panels) / 2;
}

// Results of a span of rows, or of pixels of one image, by blocks of 32.
template <class V>
struct RowOutput {
  const TileGemmBf16& a;
  float* square;

  int64_t count(int64_t block) const { return std::min(kPixels, a.m - block * kPixels); }
  void ask(int64_t block, const int32_t*, int64_t, int64_t from) const {
    const Bf16* out = a.out + block * kPixels * a.n + from;
    for (int64_t r = 0; r < count(block); ++r) __builtin_prefetch(out + r * a.n, 1);
  }
  void store(int64_t block, const int32_t* columns, int64_t features, int64_t from, int64_t to,
             const float* sums) const {
    TileBf16<V>::store_rows(a, block * kPixels, count(block), columns, features, from, to, sums,
                            square);
  }
};

template <class V>
struct PixelOutput {
  const TileGemmBf16& a;
  int64_t image;
  float* square;

  int64_t count(int64_t block) const { return std::min(kPixels, a.m - block * kPixels); }
  void ask(int64_t block, const int32_t* columns, int64_t features, int64_t) const {
    const Bf16* out = a.out + image * a.n * a.m + block * kPixels;
    for (int64_t r = 0; r < features; ++r) __builtin_prefetch(out + columns[r] * a.m, 1);
  }
  void store(int64_t block, const int32_t* columns, int64_t features, int64_t from, int64_t to,
             float* sums) const {
    const int64_t pixel = block * kPixels, pixels = count(block);
    TileBf16<V>::store_pixels(a, image, pixel, pixels, columns, features, sums);
    int64_t column = 0;
    for (int64_t f = from; f < to && to - from != features; ++f) {
      if (column < features && columns[column] == f) {
        ++column;
        continue;
      }
      const int32_t gap = static_cast<int32_t>(f);
      std::fill_n(square, kPixels, 0.0f);
      TileBf16<V>::store_pixels(a, image, pixel, pixels, &gap, 1, square);
    }
  }
};

// A span of blocks of 32 rows of x.
template <class V>
void tile_gemm_bf16_row_major(const TileGemmBf16& a, const TileSpan& span, float* scratch) {
  using M = TileBf16<V>;
  const auto room = M::room(a, scratch);
  const RowOutput<V> output{a, room.square};
  M::run(
      a, span, room,
      [&](int64_t block, Bf16* panel) {
        M::pack_rows(a, block * kPixels, output.count(block), panel);
      },
      output);
}

// A span of blocks of 32 pixels of an image.
template <class V>
void tile_gemm_bf16_feature_major(const TileGemmBf16& a, const TileSpan& span, float* scratch) {
  using M = TileBf16<V>;
  const auto room = M::room(a, scratch);
  const PixelOutput<V> output{a, span.image, room.square};
  M::run(
      a, span, room,
      [&](int64_t block, Bf16* panel) {
        M::pack_pixels(a, span.image, block * kPixels, output.count(block), panel);
      },
      output);
}

}  // namespace fxprune
