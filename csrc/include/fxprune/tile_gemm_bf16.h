// Tile-wise GEMM in bfloat16 with sums in float, for both layouts of the activations.
//
//   panel[k][32]     = x of a block of 32 pixels (or rows), times the gate      once per block
//   pairs[k_t][32]   = the tile's rows of the panel, two and two interleaved    once per tile
//   sums[32][32]     = up to two strips of its weights times the pairs          PairProducts
//   out              = act(sums + bias + residual), rounded; transposed for row-major
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
  static constexpr int64_t kMost = 32;               // output features at once
  static constexpr int64_t kLine = kMost + V::kWidth;  // expand() may load a vector from the last on

  // Parts of the scratch (bf16_scratch).
  struct Room {
    Bf16 *panels, *pairs;
    float *sums, *lines;
  };

  static Room room(const TileShape& a, float* scratch) {
    Room r;
    r.sums = scratch;
    r.lines = r.sums + kMost * kPixels;
    r.pairs = reinterpret_cast<Bf16*>(r.lines + kPixels * kLine);
    r.panels = r.pairs + (a.k + kDeep) * kPixels;
    return r;
  }

  // ---- panels ----

  static void pack_pixels(const TileGemmBf16& a, int64_t image, int64_t pixel, int64_t count,
                          Bf16* panel) {
    const Bf16* from = a.x + image * a.k * a.m + pixel;
    const Bf16* gate = a.gate ? a.gate + image * a.k : nullptr;
    for (int64_t k = 0; k < a.k; ++k, from += a.m, panel += kPixels) {
      V::copy_bf16(from, count, panel);
      if (!gate) continue;
      const Reg factor = V::set1(widen(gate[k]));
      for (int64_t p = 0; p < kPixels; p += kW)
        V::store_bf16(panel + p, V::mul(factor, V::load_bf16(panel + p)));
    }
  }

  static void pack_rows(const TileGemmBf16& a, int64_t row, int64_t count, Bf16* panel) {
    alignas(64) Bf16 square[kPixels * kDeep];
    for (int64_t k = 0; k < a.k; k += kDeep) {
      const Bf16* from = a.x + row * a.k + k;
      const int64_t deep = std::min(kDeep, a.k - k);
      if (count == kPixels && deep == kDeep) {
        V::transpose_bf16(from, a.k, panel + k * kPixels);
        continue;
      }
      for (int64_t r = 0; r < kPixels; ++r)
        V::copy_bf16(from + (r < count ? r * a.k : 0), r < count ? deep : 0, square + r * kDeep);
      V::transpose_bf16(square, kDeep, panel + k * kPixels);
    }
  }

  static void gather(const int32_t* index, int64_t count, const Bf16* panel, Bf16* pairs) {
    alignas(64) static constexpr Bf16 kNothing[kPixels] = {};
    const int64_t end = (count + kDeep - 1) / kDeep * kDeep;
    int64_t i = 0;
    for (; i + 1 < count; i += 2)
      V::interleave(panel + index[i] * kPixels, panel + index[i + 1] * kPixels, pairs + i * kPixels);
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

  // Lanes of features [f, f + kW) among increasing columns from `*column` on.
  static uint32_t kept_lanes(const int32_t* columns, int64_t count, int64_t f, int64_t* column) {
    uint32_t lanes = 0;
    for (; *column < count && columns[*column] < f + kW; ++*column)
      lanes |= 1u << (columns[*column] - f);
    return lanes;
  }

  // Columns of sums as rows of the result: features [from, to), of which `columns` are computed.
  static void store_rows(const TileGemmBf16& a, int64_t row, int64_t count, const int32_t* columns,
                         int64_t features, int64_t from, int64_t to, const Room& room) {
    for (int64_t f = 0; f < features; f += kW) {
      for (int64_t p = 0; p < count; p += kW)
        V::transpose(room.sums + f * kPixels + p, kPixels, room.lines + p * kLine + f, kLine);
    }
    const Clamp clamp = clamp_of(a.activation);
    const Reg low = V::set1(clamp.low), high = V::set1(clamp.high);
    const bool smooth = !is_clamp(a.activation), whole = to - from == features;
    int64_t column = 0;
    for (int64_t f = from; f < to; f += kW) {
      const int64_t lanes = to - f, first = column;
      const uint32_t kept = whole ? 0 : kept_lanes(columns, features, f, &column);
      const bool full = lanes >= kW;
      const Reg bias = !a.bias ? V::zero() : full ? V::load(a.bias + f) : V::load(a.bias + f, V::first(lanes));
      for (int64_t p = 0; p < count; ++p) {
        float* line = room.lines + p * kLine;
        const int64_t at = (row + p) * a.n + f;
        Reg y = V::add(whole ? V::load(line + f - from) : V::expand(line + first, kept), bias);
        if (a.residual) {
          y = V::add(y, full ? V::load_bf16(a.residual + at)
                             : V::load_bf16(a.residual + at, lanes));
        }
        if (smooth) {
          alignas(64) float some[kW];
          V::store(some, y);
          activate<V>(a.activation, some, kW);
          y = V::load(some);
        } else {
          y = V::min(high, V::max(low, y));
        }
        if (full) {
          V::store_bf16(a.out + at, y);
        } else {
          V::store_bf16(a.out + at, lanes, y);
        }
      }
    }
  }

  // ---- tiles ----

  // The tiles of a span over one block. Calls store(columns, features, from, to) for each pair of
  // strips, and for features that no column covers with features = 0; [from, to) is what it
  // completes.
  template <class Store>
  static void tiles(const TileGemmBf16& a, const TileSpan& span, const Bf16* image,
                    const Bf16* panel, int64_t halves, const Room& room, PairProducts<V>& products,
                    const Store& store) {
    const int64_t end = a.features_to(span.tile_end);
    int64_t from = a.features_from(span.tile_begin);
    for (int64_t t = span.tile_begin; t < span.tile_end; ++t) {
      const int64_t start = a.tile_ptr[t], width = a.width(t), depth = image_depth(a, t);
      const int64_t strip = strip_rows(width), padded = image_rows(width);
      gather(a.index + start, a.tile_ptr[t + 1] - start, panel, room.pairs);
      for (int64_t f = 0; f < padded; f += 2 * strip) {
        const int64_t strips = std::min<int64_t>(2, (padded - f) / strip);
        const int64_t features = std::min(width - f, strips * strip);
        const int32_t* columns = a.columns + t * a.granularity + f;
        const bool last = f + features == width && t + 1 == span.tile_end;
        const int64_t to = last ? end : columns[features];
        products.run(image + f * depth * kDeep, depth, strip, strips, room.pairs, halves,
                     room.sums);
        store(columns, features, from, to);
        from = to;
      }
      image += padded * depth * kDeep;
    }
    if (from < end) store(a.columns, 0, from, end);
  }
};

// Floats of scratch that a unit with panels for `blocks` blocks needs.
template <class V>
int64_t bf16_scratch(const TileShape& a, int64_t blocks) {
  using M = TileBf16<V>;
  return M::kMost * kPixels + kPixels * M::kLine +
         ((a.k + kDeep) + (a.k + kDeep) * blocks) * kPixels / 2;
}

// A span of blocks of 32 rows of x.
template <class V>
void tile_gemm_bf16_row_major(const TileGemmBf16& a, const TileSpan& span, float* scratch) {
  using M = TileBf16<V>;
  const auto room = M::room(a, scratch);
  const Bf16* image = a.values + image_offset(a, span.tile_begin);
  PairProducts<V> products;
  for (int64_t block = span.begin; block < span.end; ++block) {
    const int64_t row = block * kPixels, count = std::min(kPixels, a.m - row);
    M::pack_rows(a, row, count, room.panels);
    M::tiles(a, span, image, room.panels, count > kPixels / 2 ? 2 : 1, room, products,
             [&](const int32_t* columns, int64_t features, int64_t from, int64_t to) {
               M::store_rows(a, row, count, columns, features, from, to, room);
             });
  }
}

// A span of blocks of 32 pixels of an image.
template <class V>
void tile_gemm_bf16_feature_major(const TileGemmBf16& a, const TileSpan& span, float* scratch) {
  using M = TileBf16<V>;
  const auto room = M::room(a, scratch);
  const Bf16* image = a.values + image_offset(a, span.tile_begin);
  PairProducts<V> products;
  for (int64_t block = span.begin; block < span.end; ++block) {
    const int64_t pixel = block * kPixels, count = std::min(kPixels, a.m - pixel);
    M::pack_pixels(a, span.image, pixel, count, room.panels);
    M::tiles(a, span, image, room.panels, count > kPixels / 2 ? 2 : 1, room, products,
             [&](const int32_t* columns, int64_t features, int64_t from, int64_t to) {
               M::store_pixels(a, span.image, pixel, count, columns, features, room.sums);
               if (to - from == features) return;
               int64_t column = 0;
               for (int64_t f = from; f < to; ++f) {
                 if (column < features && columns[column] == f) {
                   ++column;
                   continue;
                 }
                 const int32_t gap = static_cast<int32_t>(f);
                 std::fill_n(room.sums, kPixels, 0.0f);
                 M::store_pixels(a, span.image, pixel, count, &gap, 1, room.sums);
               }
             });
  }
}

}  // namespace fxprune
