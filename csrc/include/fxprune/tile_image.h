// The image of tile-packed bfloat16 weights that kernels multiply by, derived from the packed
// format and never stored.
//
// Tile by tile, each cut in strips of output features: strips of 16, or one of 8 where the tile is
// no wider. A strip is [ceil(k_t / 32)][strip][32]: blocks of 32 kept input features in a row per
// output feature, so that a block is an operand of the matrix unit as it lies, and a pair of
// neighbours one of a dot product. What is missing is zero.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/tile_gemm.h"

namespace fxprune {

constexpr int64_t kDeep = 32;    // input features of a block
constexpr int64_t kPixels = 32;  // pixels or rows that are multiplied at once

inline int64_t strip_rows(int64_t width) {
  return width <= 8 ? 8 : 16;
}
inline int64_t image_rows(int64_t width) {
  const int64_t strip = strip_rows(width);
  return (width + strip - 1) / strip * strip;
}
inline int64_t image_depth(const TileShape& a, int64_t tile) {
  return (a.tile_ptr[tile + 1] - a.tile_ptr[tile] + kDeep - 1) / kDeep;
}
// Where a tile's part begins; at a.tiles, the length of the image.
inline int64_t image_offset(const TileShape& a, int64_t tile) {
  int64_t length = 0;
  for (int64_t t = 0; t < tile; ++t) length += image_depth(a, t) * kDeep * image_rows(a.width(t));
  return length;
}

// Blocks of 32 pixels whose panels, (k, 32) each, are in L2 together.
inline int64_t bf16_group(const TileShape& a) {
  constexpr int64_t kPanels = 320 * 1024;  // numbers
  return std::max<int64_t>(1, kPanels / std::max<int64_t>(a.k * kPixels, 1));
}

// Floats of scratch of a single row: its sums, those of a strip, and the kept input features.
inline int64_t row_scratch(const TileShape& a) {
  return a.n + 2 * kDeep + (a.k + kDeep) / 2;
}

// Which pixels of a plane the lanes of a block are: in each run, lane i is pixel shift + i.
struct BlockLanes {
  struct Run {
    int32_t shift;
    uint32_t lanes;
  };
  Run runs[kPixels];
  int64_t count = 0;

  void add(int64_t shift, int64_t first, int64_t last) {
    const uint64_t lanes = (uint64_t{1} << last) - (uint64_t{1} << first);
    runs[count++] = {static_cast<int32_t>(shift), static_cast<uint32_t>(lanes)};
  }
  bool whole() const { return count == 1 && runs[0].lanes == ~0u; }
};

// Calls f(position in the image) for every kept weight, in the order of the packed values.
template <class F>
void for_each_in_image(const TileShape& a, F f) {
  int64_t base = 0;
  for (int64_t t = 0; t < a.tiles; ++t) {
    const int64_t width = a.width(t), strip = strip_rows(width), depth = image_depth(a, t);
    const int64_t count = a.tile_ptr[t + 1] - a.tile_ptr[t];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t block = i / kDeep, lane = i % kDeep;
      for (int64_t j = 0; j < width; ++j) {
        const int64_t first = base + j / strip * depth * strip * kDeep;
        f(first + (block * strip + j % strip) * kDeep + lane);
      }
    }
    base += depth * kDeep * image_rows(width);
  }
}

}  // namespace fxprune
