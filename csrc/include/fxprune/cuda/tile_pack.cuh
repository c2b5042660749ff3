// Gather of a dense weight (n, k) into packed tiles on the GPU, and its transpose.
#pragma once

#include "fxprune/cuda/ptx.cuh"

namespace fxprune::gpu {

struct TilePackArgs {
  const int32_t* index;
  const int32_t* tile_ptr;
  const int32_t* columns;
  int64_t k, kept, granularity, tiles;
  const void* from;
  void* to;
};

// Bits: an unsigned integer of the element's size. Grid: (elements of a tile, tiles). Unpacking
// writes into zeros.
template <class Bits, bool Unpack>
struct TilePack {
  using Args = TilePackArgs;
  static constexpr int kThreads = 256, kBlocks = 4;

  static FXPRUNE_GPU void run(const Args& a) {
    for (int64_t t = block(1); t < a.tiles; t += blocks(1)) {
      const int64_t first = load_global<int32_t>(a.tile_ptr + t),
                    rows = load_global<int32_t>(a.tile_ptr + t + 1) - first;
      const int64_t left_over = a.kept - t * a.granularity;
      const int64_t width = left_over < a.granularity ? left_over : a.granularity;
      for (int64_t i = block(0) * kThreads + thread(); i < rows * width;
           i += blocks(0) * kThreads) {
        const int64_t row = load_global<int32_t>(a.index + first + i / width),
                      column = load_global<int32_t>(a.columns + t * a.granularity + i % width);
        const int64_t dense = column * a.k + row, packed = first * a.granularity + i;
        const Bits* from = static_cast<const Bits*>(a.from);
        Bits* to = static_cast<Bits*>(a.to);
        store_global<Bits>(to + (Unpack ? dense : packed),
                           load_global<Bits>(from + (Unpack ? packed : dense)));
      }
    }
  }
};

template <class Bits, class Launcher>
void tile_pack(Launcher& launcher, const TilePackArgs& a, int64_t rows, bool unpack) {
  if (a.tiles == 0) return;
  const int64_t grid[3] = {(rows * a.granularity / a.tiles + 256) / 256,
                           a.tiles < 65535 ? a.tiles : 65535, 1};
  if (unpack) {
    launcher.template launch<TilePack<Bits, true>>(grid, 0, a);
  } else {
    launcher.template launch<TilePack<Bits, false>>(grid, 0, a);
  }
}

}  // namespace fxprune::gpu
