// The image of a tile-packed 16-bit weight that the tensor-core kernels copy into shared memory as
// it is. Derived from the packed format at load time or per call, never saved.
//
//   table   int32: order[tiles] (tiles by falling number of K rows), first_block[tiles + 1];
//           padded to 1024 bytes
//   blocks  of 64 K rows each, tile after tile; a tile's last block is filled up with zero rows
//   block   panels of 64 output features, G/64 of them (rounded up, zero features behind)
//   panel   64 rows of 128 bytes; in row k the 16-byte chunk c lies at chunk c ^ k%8: the layout
//           that wgmma calls K-major rows with a 128-byte swizzle, and free of bank conflicts for
//           ldmatrix
//
// The image of weights of which each feature keeps at most two in four consecutive K rows of its
// tile (`halved`) has other panels: the kept elements of 64 features and their places, in the
// layout of nm_multiply.cuh. It is derived on the host alone (fxprune/ops/cuda_nm_image.py).
//
// Only the structure's shapes are needed to size it, so that nothing is read back from the GPU.
#pragma once

#include "fxprune/cuda/ptx.cuh"

namespace fxprune::gpu {

constexpr int kBlockRows = 64, kPanel = 64, kPanelBytes = kBlockRows * kPanel * 2;
constexpr int kHalvedPanelBytes = kPanelBytes / 2 + kPanel * kBlockRows / 8;  // and 2 bits each

struct TileImage {
  int64_t tiles, rows, granularity;  // rows: kept K rows of all tiles together
  bool halved = false;

  FXPRUNE_BOTH int64_t panels() const { return (granularity + kPanel - 1) / kPanel; }
  FXPRUNE_BOTH int64_t table_bytes() const { return ((2 * tiles + 1) * 4 + 1023) / 1024 * 1024; }
  FXPRUNE_BOTH int64_t panel_bytes() const { return halved ? kHalvedPanelBytes : kPanelBytes; }
  FXPRUNE_BOTH int64_t block_bytes() const { return panels() * panel_bytes(); }
  // Each tile wastes less than a block.
  FXPRUNE_BOTH int64_t most_blocks() const { return rows / kBlockRows + tiles; }
  FXPRUNE_BOTH int64_t bytes() const { return table_bytes() + most_blocks() * block_bytes(); }
};

FXPRUNE_BOTH int64_t tile_blocks(int64_t rows) {
  return (rows + kBlockRows - 1) / kBlockRows;
}

// Byte of element (row k, feature f) of a panel; both below 64.
FXPRUNE_BOTH int panel_offset(int k, int f) {
  return k * 128 + ((f / 8) ^ (k % 8)) * 16 + f % 8 * 2;
}

struct TileImageArgs {
  TileImage image;
  const void* values;       // per tile a row-major [k_t][g_t] block, 16-bit elements
  const int32_t* tile_ptr;  // tiles + 1
  int64_t kept;             // output features of all tiles
  void* out;
};

// order and first_block. One thread a tile; every thread looks at all tiles.
struct TileTable {
  using Args = TileImageArgs;
  static constexpr int kThreads = 256, kBlocks = 1;

  static FXPRUNE_GPU void run(const Args& a) {
    const int64_t t = block(0) * kThreads + thread(), tiles = a.image.tiles;
    if (t > tiles) return;
    int32_t* order = static_cast<int32_t*>(a.out);
    const auto rows_of = [&a](int64_t u) {
      return load_global<int32_t>(a.tile_ptr + u + 1) - load_global<int32_t>(a.tile_ptr + u);
    };
    const int32_t own = t < tiles ? rows_of(t) : 0;
    int64_t rank = 0, before = 0;
    for (int64_t u = 0; u < tiles; ++u) {
      const int32_t rows = rows_of(u);
      rank += rows > own || (rows == own && u < t);
      before += u < t ? tile_blocks(rows) : 0;
    }
    if (t < tiles) store_global<int32_t>(order + rank, static_cast<int32_t>(t));
    store_global<int32_t>(order + tiles + t, static_cast<int32_t>(before));
  }
};

// The blocks, after the table. A thread writes 16 bytes; grid: (rows of 256 chunks, tiles).
struct TileBlocks {
  using Args = TileImageArgs;
  static constexpr int kThreads = 256, kBlocks = 4;

  static FXPRUNE_GPU void run(const Args& a) {
    const TileImage& image = a.image;
    const int64_t chunks_per_row = image.panels() * 8;
    for (int64_t t = block(1); t < image.tiles; t += blocks(1)) {
      const int64_t first = load_global<int32_t>(a.tile_ptr + t),
                    rows = load_global<int32_t>(a.tile_ptr + t + 1) - first;
      const int64_t blocks_before =
          load_global<int32_t>(static_cast<const int32_t*>(a.out) + image.tiles + t);
      const int64_t left_over = a.kept - t * image.granularity;
      const int64_t width = left_over < image.granularity ? left_over : image.granularity;
      const uint16_t* values = static_cast<const uint16_t*>(a.values) + first * image.granularity;
      char* out =
          static_cast<char*>(a.out) + image.table_bytes() + blocks_before * image.block_bytes();
      const int64_t chunks = tile_blocks(rows) * kBlockRows * chunks_per_row;
      for (int64_t i = block(0) * kThreads + thread(); i < chunks; i += blocks(0) * kThreads) {
        const int64_t k = i / chunks_per_row, f = i % chunks_per_row * 8;
        uint16_t element[8];
        FXPRUNE_UNROLLED
        for (int j = 0; j < 8; ++j) {
          const bool inside = k < rows && f + j < width;
          element[j] = inside ? load_global<uint16_t>(values + k * width + f + j) : uint16_t{0};
        }
        const int64_t at =
            k / kBlockRows * image.block_bytes() + f / kPanel * kPanelBytes +
            panel_offset(static_cast<int>(k % kBlockRows), static_cast<int>(f % kPanel));
        store_global<Quad>(out + at, quad_of(element));
      }
    }
  }
};

template <class Launcher>
void tile_image(Launcher& launcher, const TileImageArgs& a) {
  const int64_t table[3] = {a.image.tiles / TileTable::kThreads + 1, 1, 1};
  launcher.template launch<TileTable>(table, 0, a);
  if (a.image.tiles == 0) return;
  const int64_t mean_chunks =
      tile_blocks(a.image.rows / a.image.tiles + 1) * kBlockRows * a.image.panels() * 8;
  const int64_t grid[3] = {(mean_chunks + TileBlocks::kThreads - 1) / TileBlocks::kThreads,
                           a.image.tiles < 65535 ? a.image.tiles : 65535, 1};
  launcher.template launch<TileBlocks>(grid, 0, a);
}

}  // namespace fxprune::gpu
