// Arguments of the tile-wise GEMM and how its work is cut into units.
//
//   out[n] = act(sum over kept k of values[k, n] * gate[k] * x[k] + bias[n] + residual[n])
//
// Tile t covers columns[t*G .. min((t+1)*G, kept)) and the input features index[tile_ptr[t] ..
// tile_ptr[t+1]). Its weights are the row-major block values + tile_ptr[t]*G of shape [k_t][width]:
// every tile before the last one is G wide, so offsets need no table.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/activation.h"
#include "fxprune/bf16.h"

namespace fxprune {

// What a tile-wise GEMM is apart from its operands.
struct TileShape {
  const int32_t* index;     // every entry in [0, k)
  const int32_t* tile_ptr;  // tiles + 1, monotone from 0
  const int32_t* tile_end;  // tile_ptr + 1; where K is split, ends of a part of each tile's rows
  const int32_t* columns;   // kept output features, strictly increasing, in [0, n)
  const float* bias;        // (n) or null
  int64_t batch, m, k, n, kept, granularity, tiles;
  Activation activation;

  int64_t first_column(int64_t tile) const { return std::min(tile * granularity, kept); }
  int64_t width(int64_t tile) const { return first_column(tile + 1) - first_column(tile); }
  // A unit of tiles [t0, t1) owns the output features [features_from(t0), features_to(t1)), gaps
  // included.
  int64_t features_from(int64_t tile) const {
    return tile == 0 ? 0 : tile >= tiles ? n : columns[first_column(tile)];
  }
  int64_t features_to(int64_t tile) const {
    return tile >= tiles ? n : tile == 0 ? 0 : columns[first_column(tile)];
  }
};

template <class T>
struct TileGemmOf : TileShape {
  const T* x;         // feature-major (batch, k, m), row-major (m, k)
  const T* values;    // float: see above; Bf16: an image of them (tile_image.h)
  const T* residual;  // shape of out, or null
  const T* gate;      // (batch, k) or null; feature-major only
  T* out;             // feature-major (batch, n, m), row-major (m, n)
  // Feature-major, all but narrow float tiles: numbers from the end of a feature's pixels to the
  // next one's. Negative where planes hold a part of the pixels, and then the pointers are moved
  // back.
  int64_t x_gap = 0, residual_gap = 0, out_gap = 0;

  int64_t ldx() const { return m + x_gap; }
  int64_t ldr() const { return m + residual_gap; }
  int64_t ldo() const { return m + out_gap; }
};

using TileGemm = TileGemmOf<float>;
using TileGemmBf16 = TileGemmOf<Bf16>;

// `parts` vectors of sums, part p at sums + p * stride. residual: null or as long as out.
struct PartialSums {
  const float* sums;
  int64_t parts, stride;
  const float* residual;
  float* out;
  Activation activation;
};

// One unit of work: vectors [begin, end) of the pixels of one image (feature-major) or rows [begin,
// end) of x (row-major), for tiles [tile_begin, tile_end).
struct TileSpan {
  int64_t image, begin, end, tile_begin, tile_end;
};

// Where the lanes of a vector of pixels go.
struct PixelLanes {
  uint32_t bits;  // the lanes that are pixels of the result
  int32_t to;     // and where their values follow each other in a plane of it
};

// A grid of units: pixels (or rows) cut every `step`, tiles cut in `tile_parts` of equal weight.
struct TileGrid {
  int64_t images, length, step, length_parts, tile_parts;
  int64_t units() const { return images * length_parts * tile_parts; }
};

// First tile of part `part` of `parts`, each with about the same number of kept weights. A tile
// also costs its epilogue, worth about eight input features.
inline int64_t tile_cut(const TileShape& a, int64_t part, int64_t parts) {
  if (part <= 0) return 0;
  if (part >= parts) return a.tiles;
  const auto cost = [&a](int64_t t) { return int64_t{a.tile_ptr[t]} + 8 * t; };
  const int64_t target = cost(a.tiles) * part / parts;
  int64_t low = 0, high = a.tiles;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cost(middle) < target) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

inline TileSpan tile_unit(const TileShape& a, const TileGrid& g, int64_t unit) {
  const int64_t part = unit % g.tile_parts, rest = unit / g.tile_parts;
  const int64_t begin = rest % g.length_parts * g.step;
  return {rest / g.length_parts, begin, std::min(begin + g.step, g.length),
          tile_cut(a, part, g.tile_parts), tile_cut(a, part + 1, g.tile_parts)};
}

// Tiles too narrow to fill a register tile run on a panel of the activations (tile_gemm_panel.h).
// width: floats per vector.
inline bool uses_panel(const TileShape& a, bool feature_major, int64_t width) {
  return a.granularity <= (feature_major ? 1 : width / 2);
}

constexpr int kPanelVecs = 8;        // most vectors of pixels or rows in a panel
constexpr int64_t kPanelChunk = 64;  // output features whose sums are held at once

// Floats of scratch that a unit on a panel needs.
inline int64_t panel_scratch(const TileShape& a, int64_t width) {
  return (a.k + kPanelChunk) * kPanelVecs * width;
}

}  // namespace fxprune
