// Tile-wise GEMM for few K rows, 16-bit elements, sm_80 and later: the weights of a tile stay in
// shared memory while a block goes over many tokens.
//
// With K this small a block per 128 tokens is over before its copies have overlapped anything. Here
// a block computes Features (64 or 128) x 64 tokens at a time, all kept rows of them in one slab of
// shared memory; the slabs of its next tokens are under way meanwhile.
#pragma once

#include "fxprune/cuda/tile_gemm_args.cuh"

namespace fxprune::gpu {

template <class T, int Features>
struct TileGemmResident {
  using Args = TileGemmArgs;
  static constexpr int kThreads = 2 * Features, kBlocks = Features == 128 ? 2 : 4;
  static constexpr int kTokens = 64, kSlabs = 3, kMostRows = 128;  // 80 KiB at most
  static constexpr int kPanels = Features / kPanel;

  // Shared memory: weights, block of 64 rows after block, then the slabs.
  static FXPRUNE_BOTH int64_t weight_bytes(int64_t rows) {
    return tile_blocks(rows) * kPanels * kPanelBytes;
  }
  static FXPRUNE_BOTH int64_t slab_bytes(int64_t rows) { return (rows + 15) / 16 * 16 * 128; }
  static FXPRUNE_BOTH int64_t shared_bytes(int64_t rows) {
    return weight_bytes(rows) + kSlabs * slab_bytes(rows);
  }
  static FXPRUNE_BOTH int64_t token_blocks(const Args& a) {
    return (a.m + kTokens - 1) / kTokens * a.batch;
  }

  static FXPRUNE_GPU void copy_weights(const Args& a, const TileItem& item) {
    const char* from = item_blocks(a, item);
    const int64_t chunks = weight_bytes(item.rows) / 16;
    constexpr int64_t kPerBlock = kPanels * kPanelBytes / 16;
    for (int64_t i = thread(); i < chunks; i += kThreads) {
      const int64_t at = i / kPerBlock * a.layout().block_bytes() + i % kPerBlock * 16;
      copy_async<16>(shared_memory() + i * 16, from + at, true);
    }
  }

  // Points the item to token block `i`; a thread copies the same eight tokens of every so many
  // rows.
  static FXPRUNE_GPU void place(const Args& a, int64_t i, TileItem* item) {
    const int64_t per_image = (a.m + kTokens - 1) / kTokens;
    item->image = i / per_image;
    item->token = i % per_image * kTokens;
  }

  static FXPRUNE_GPU void fill(const Args& a, const TileItem& item, const int32_t* index,
                               char* slab) {
    const int column = thread() % (kTokens / 8) * 8;
    const int64_t tokens = a.m - item.token;
    const T* x = static_cast<const T*>(a.x) + item.image * a.k * a.m + item.token;
    const T* gate = a.gate == nullptr ? nullptr : static_cast<const T*>(a.gate) + item.image * a.k;
    const int rows = static_cast<int>(slab_bytes(item.rows) / 128);
    for (int k = thread() / (kTokens / 8); k < rows; k += kThreads / (kTokens / 8)) {
      const int64_t row = k < item.rows ? load_global<int32_t>(index + k) : 0;
      const bool real = k < item.rows && column < tokens;
      copy_tokens<T>(a, x, gate, row, column, tokens, real, slab + panel_offset(k, column));
    }
  }

  // Warps: 2 along tokens of 32, the others along features of 32.
  static FXPRUNE_GPU void multiply(const char* slab, int rows, float (&sums)[2][4][4]) {
    const int lane = thread() % 32, warp = thread() / 32;
    const int feature = warp / 2 * 32, token = warp % 2 * 32;
    for (int k = 0; k < rows; k += 16) {
      const int row = k + lane / 16 * 8 + lane % 8, within = k + lane / 8 % 2 * 8 + lane % 8;
      uint32_t b[2][4];
      FXPRUNE_UNROLLED
      for (int j = 0; j < 2; ++j) {
        load_matrices_transposed(b[j], slab + panel_offset(within, token + 16 * j + lane / 16 * 8));
      }
      FXPRUNE_UNROLLED
      for (int i = 0; i < 2; ++i) {
        const int column = feature + 16 * i + lane / 8 % 2 * 8;
        uint32_t w[4];
        load_matrices_transposed(
            w, shared_memory() + (row / kBlockRows * kPanels + column / kPanel) * kPanelBytes +
                   panel_offset(row % kBlockRows, column % kPanel));
        FXPRUNE_UNROLLED
        for (int j = 0; j < 4; ++j) {
          multiply_16x8x16<T>(sums[i][j], w, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  static FXPRUNE_GPU void finish(const Args& a, const TileItem& item,
                                 const float (&sums)[2][4][4]) {
    const int lane = thread() % 32, warp = thread() / 32;
    FXPRUNE_UNROLLED
    for (int i = 0; i < 4; ++i) {
      float v[4][2], tokens[8];
      FXPRUNE_UNROLLED
      for (int j = 0; j < 8; ++j) v[j / 2][j % 2] = sums[i / 2][j / 2][i % 2 * 2 + j % 2];
      gather_columns(v, tokens);
      const int64_t column = item.first + warp / 2 * 32 + 8 * i + lane / 4;
      finish_tokens<T>(a, item, column, item.token + warp % 2 * 32 + lane % 4 * 8, tokens);
    }
  }

  // Grid: (tiles in parts of Features, blocks that share the tokens).
  static FXPRUNE_GPU void run(const Args& a) {
    const int64_t parts = a.layout().panels() / kPanels, all = token_blocks(a);
    TileItem item;
    item.first = block(0) % parts * Features;
    item.tile = load_global<int32_t>(static_cast<const int32_t*>(a.image) + block(0) / parts);
    const int64_t from = load_global<int32_t>(a.tile_ptr + item.tile);
    item.rows = load_global<int32_t>(a.tile_ptr + item.tile + 1) - from;
    const int32_t* index = a.index + from;
    const int64_t slab = slab_bytes(item.rows);
    char* slabs = shared_memory() + weight_bytes(item.rows);
    const auto fill_next = [&](int64_t i, int place_of) {
      if (i < all) {
        TileItem at = item;
        place(a, i, &at);
        fill(a, at, index, slabs + place_of * slab);
      }
      copy_commit();
    };
    copy_weights(a, item);  // waited for with the first slab
    int64_t ahead = block(1);
    for (int i = 0; i < kSlabs - 1; ++i, ahead += blocks(1)) fill_next(ahead, i);
    int current = 0;
    for (int64_t i = block(1); i < all; i += blocks(1), ahead += blocks(1)) {
      copy_wait<kSlabs - 2>();
      barrier();  // the slab is there for all, and nobody reads the one before any more
      fill_next(ahead, (current + kSlabs - 1) % kSlabs);
      float sums[2][4][4] = {};
      multiply(slabs + current * slab, static_cast<int>(slab / 128), sums);
      place(a, i, &item);
      finish(a, item, sums);
      current = (current + 1) % kSlabs;
    }
    copy_wait<0>();
  }
};

// True where every tile fits, and a block gets tokens enough to be worth it.
template <class T>
bool is_resident(const TileGemmArgs& a) {
  using Kernel = TileGemmResident<T, 64>;
  return a.k <= Kernel::kMostRows && Kernel::token_blocks(a) >= 4 * Kernel::kSlabs;
}

template <class T, class Launcher>
void tile_gemm_resident(Launcher& launcher, const TileGemmArgs& a, int processors) {
  const auto launch = [&](auto kernel) {
    using Kernel = decltype(kernel);
    const int64_t items = a.layout().panels() / Kernel::kPanels * a.tiles;
    const int64_t wanted = (int64_t{Kernel::kBlocks} * processors + items - 1) / items;
    const int64_t most = Kernel::token_blocks(a) / Kernel::kSlabs;
    const int64_t shared = wanted < most ? wanted : most;
    const int64_t grid[3] = {items, shared < 65535 ? shared : 65535, 1};
    launcher.template launch<Kernel>(grid, Kernel::shared_bytes(a.k), a);
  };
  if (a.layout().panels() % 2 == 0) return launch(TileGemmResident<T, 128>());
  launch(TileGemmResident<T, 64>());
}

}  // namespace fxprune::gpu
