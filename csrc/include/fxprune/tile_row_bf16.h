// Tile-wise GEMM of a single row in bfloat16: dot products of the rows of the image with the kept
// input features. A block of 32 rows (tile_gemm_bf16_row_major.h) would be almost empty.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/math.h"
#include "fxprune/tile_image.h"
#include "fxprune/unroll.h"

namespace fxprune {

template <class V>
struct RowBf16 {
  using Reg = typename V::Reg;
  static constexpr int kW = V::kWidth, kRows = 8;  // sums at once; a strip has 8 or 16

  // x[0 .. count) of the kept input features, padded with zeros to whole blocks.
  static void gather(const Bf16* x, const int32_t* index, int64_t count, Bf16* to) {
    if (count > 0 && index[count - 1] - index[0] == count - 1) {
      std::copy_n(x + index[0], count, to);
    } else {
      for (int64_t i = 0; i < count; ++i) to[i] = x[index[i]];
    }
    std::fill(to + count, to + (count + kDeep - 1) / kDeep * kDeep, Bf16{0});
  }

  // sums[r] of the `rows` output features of a strip.
  static void strip(const Bf16* image, int64_t depth, int64_t rows, const Bf16* x, float* sums) {
    for (int64_t first = 0; first < rows; first += kRows) {
      Reg acc[kRows];
      FXPRUNE_UNROLL
      for (int r = 0; r < kRows; ++r) acc[r] = V::zero();
      for (int64_t d = 0; d < depth; ++d) {
        const Bf16* w = image + (d * rows + first) * kDeep;
        for (int64_t k = 0; k < kDeep; k += 2 * kW) {
          const auto pairs = V::load_pairs(x + d * kDeep + k);
          FXPRUNE_UNROLL
          for (int r = 0; r < kRows; ++r)
            acc[r] = V::dot(V::load_pairs(w + r * kDeep + k), pairs, acc[r]);
        }
      }
      FXPRUNE_UNROLL
      for (int r = 0; r < kRows; ++r) sums[first + r] = V::sum(acc[r]);
    }
  }

  // Output features [from, from + count) from their sums, which it changes.
  static void store(const TileGemmBf16& a, int64_t from, int64_t count, float* sums) {
    const Clamp clamp = clamp_of(a.activation);
    const Reg low = V::set1(clamp.low), high = V::set1(clamp.high);
    for (int64_t f = 0; f < count; f += kW) {
      Reg y = V::load(sums + f);
      if (a.bias) y = V::add(y, V::load(a.bias + from + f, V::first(count - f)));
      if (a.residual) y = V::add(y, V::load_bf16(a.residual + from + f, count - f));
      V::store(sums + f, V::min(high, V::max(low, y)));
    }
    if (!is_clamp(a.activation)) activate<V>(a.activation, sums, count);
    for (int64_t f = 0; f < count; f += kW)
      V::store_bf16(a.out + from + f, count - f, V::load(sums + f));
  }
};

// Tiles of a span of the only row. scratch: row_scratch floats.
template <class V>
void tile_row_bf16(const TileGemmBf16& a, const TileSpan& span, float* scratch) {
  using M = RowBf16<V>;
  constexpr int64_t kMost = 16;  // rows of a strip
  const int64_t from = a.features_from(span.tile_begin),
                count = a.features_to(span.tile_end) - from;
  float *sums = scratch, *part = sums + (count + kMost - 1) / kMost * kMost;
  Bf16* x = reinterpret_cast<Bf16*>(part + kMost);
  std::fill(sums, part, 0.0f);
  const Bf16* image = a.values + image_offset(a, span.tile_begin);
  for (int64_t t = span.tile_begin; t < span.tile_end; ++t) {
    const int64_t start = a.tile_ptr[t], width = a.width(t), depth = image_depth(a, t),
                  rows = strip_rows(width);
    const int32_t* columns = a.columns + t * a.granularity;
    M::gather(a.x, a.index + start, a.tile_ptr[t + 1] - start, x);
    for (int64_t f = 0; f < width; f += rows, image += depth * rows * kDeep) {
      M::strip(image, depth, rows, x, part);
      for (int64_t r = 0; r < std::min(rows, width - f); ++r) sums[columns[f + r] - from] = part[r];
    }
  }
  M::store(a, from, count, sums);
}

}  // namespace fxprune
