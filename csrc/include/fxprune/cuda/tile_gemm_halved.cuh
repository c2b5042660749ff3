// Tile-wise GEMM on mma.sp: weights of which each output feature keeps at most two in four of its
// tile's K rows (TVW). sm_80 and later, 16-bit elements, sums in float.
//
// A warp computes 64 features x 32 tokens; a block of 4 warps 128 x 64, or 64 x 128 where a tile
// has an odd number of panels. K goes by in the image's blocks of 64 rows, kStages of them in
// flight: kept elements and places as they lie there, rows of x gathered by the tile's index list.
#pragma once

#include "fxprune/cuda/nm_multiply.cuh"
#include "fxprune/cuda/stage_ring.cuh"
#include "fxprune/cuda/tile_gemm_args.cuh"

namespace fxprune::gpu {

template <class T, int Features>
struct TileGemmHalved {
  using Args = TileGemmArgs;
  static constexpr int kThreads = 128, kBlocks = Features == 128 ? 3 : 2, kStages = 4;
  static constexpr int kPanels = Features / kPanel, kTokens = 128 / kPanels;
  static constexpr int kWeightBytes = kPanels * kHalvedPanelBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokens / kPanel * kPanelBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;

  using Source = TileSource<T>;

  static FXPRUNE_GPU void fill(const Args& a, const TileItem& item, const Source& s, int stage,
                               char* to) {
    const char* weights = s.weights + stage * a.layout().block_bytes();
    for (int chunk = thread(); chunk < kWeightBytes / 16; chunk += kThreads) {
      copy_async<16>(to + chunk * 16, weights + chunk * 16, true);
    }
    char* tokens = to + kWeightBytes;
    const int64_t first_row = int64_t{stage} * kBlockRows;
    FXPRUNE_UNROLLED
    for (int i = 0; i < kBlockRows * kTokens / 8 / kThreads; ++i) {
      const int chunk = thread() + i * kThreads;
      const int k = chunk / (kTokens / 8), column = chunk % (kTokens / 8) * 8;
      const bool inside = first_row + k < item.rows;
      const int64_t row = inside ? load_global<int32_t>(s.index + first_row + k) : 0;
      copy_tokens<T>(a, s.x, s.gate, row, column, s.tokens, inside && column < s.tokens,
                     tokens + column / kPanel * kPanelBytes + panel_offset(k, column % kPanel));
    }
  }

  static FXPRUNE_GPU void run(const Args& a) {
    const TileItem item = tile_item(a, block(0), Features, kTokens);
    const Source s(a, item);
    const int stages = static_cast<int>(tile_blocks(item.rows));
    const int lane = thread() % 32, warp = thread() / 32;
    const int panel = warp % kPanels, token = warp / kPanels * 32;

    float sums[4][4][4] = {};
    const auto multiply = [&](int, const char* stage) {
      const char* kept = stage + panel * kHalvedPanelBytes;
      multiply_kept<T>(kept, kept + kPanelBytes / 2,
                       stage + kWeightBytes + token / kPanel * kPanelBytes, token % kPanel, sums);
    };
    through_ring<kStages, kStageBytes>(
        shared_memory(), stages, [&](int i, char* to) { fill(a, item, s, i, to); }, multiply);

    FXPRUNE_UNROLLED
    for (int i = 0; i < 8; ++i) {
      float v[4][2], tokens[8];
      FXPRUNE_UNROLLED
      for (int j = 0; j < 8; ++j) v[j / 2][j % 2] = sums[i / 2][j / 2][i % 2 * 2 + j % 2];
      gather_columns(v, tokens);
      const int64_t column = item.first + panel * kPanel + 8 * i + lane / 4;
      finish_tokens<T>(a, item, column, item.token + token + lane % 4 * 8, tokens);
    }
  }
};

}  // namespace fxprune::gpu
