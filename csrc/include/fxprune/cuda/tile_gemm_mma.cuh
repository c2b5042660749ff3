// Tile-wise GEMM on mma.sync: sm_80 and later, 16-bit elements, sums in float.
//
// A block of 8 warps computes Features (64 or 128) x 128 tokens; K goes by in stages of 32 rows,
// kStages of them in flight. The weights of a stage are copied from the image as they lie there;
// the rows of x are gathered by the tile's index list, into panels of the same layout. Where rows
// cannot be copied in 16-byte pieces, or are scaled by a gate, they come through registers.
// Windowed: the implicit GEMM of a convolution, whose rows always do.
#pragma once

#include <type_traits>

#include "fxprune/cuda/stage_ring.cuh"
#include "fxprune/cuda/tile_window.cuh"

namespace fxprune::gpu {

template <class T, int Features, bool Windowed>
struct TileGemmMma {
  using Args = TileGemmArgs;
  static constexpr int kThreads = 256, kBlocks = Windowed ? 1 : Features == 128 ? 2 : 3;
  static constexpr int kTokens = 128, kRows = 32, kStages = 4;
  static constexpr int kHalfPanel = kRows * 128;  // bytes of a stage's panel
  static constexpr int kWeightBytes = Features / kPanel * kHalfPanel;
  static constexpr int kStageBytes = kWeightBytes + kTokens / kPanel * kHalfPanel;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // Warps: 4 along tokens, 2 along features; of each 32 tokens and half the features.
  static constexpr int kBlocksM = Features / 32;  // 16-row blocks of a warp

  using Source = TileSource<T>;
  // A thread always gathers the same eight tokens.
  using Window = std::conditional_t<Windowed, WindowTokens<T, 8>, NoTokens>;

  static FXPRUNE_GPU void fill(const Args& a, const TileItem& item, const Source& s,
                               const Window& window, int stage, char* to) {
    const int64_t first_row = int64_t{stage} * kRows;
    const char* weights = s.weights + first_row / kBlockRows * a.layout().block_bytes() +
                          first_row % kBlockRows * 128;
    FXPRUNE_UNROLLED
    for (int i = 0; i < kWeightBytes / 16 / kThreads; ++i) {
      const int chunk = thread() + i * kThreads;
      const int panel = chunk / (kHalfPanel / 16), within = chunk % (kHalfPanel / 16);
      copy_async<16>(to + chunk * 16, weights + int64_t{panel} * kPanelBytes + within * 16, true);
    }
    char* tokens = to + kWeightBytes;
    FXPRUNE_UNROLLED
    for (int i = 0; i < kRows * kTokens / 8 / kThreads; ++i) {
      const int chunk = thread() + i * kThreads;
      const int k = chunk / (kTokens / 8), column = chunk % (kTokens / 8) * 8;
      const bool real = first_row + k < item.rows && column < s.tokens;
      const int64_t row =
          first_row + k < item.rows ? load_global<int32_t>(s.index + first_row + k) : 0;
      char* at = tokens + column / kPanel * kHalfPanel + panel_offset(k, column % kPanel);
      if constexpr (Windowed) {
        window.copy(a.window, static_cast<int32_t>(row), first_row + k < item.rows, at);
        continue;
      }
      copy_tokens<T>(a, s.x, s.gate, row, column, s.tokens, real, at);
    }
  }

  static FXPRUNE_GPU void multiply(const char* stage, float (&sums)[kBlocksM][4][4]) {
    const int lane = thread() % 32, warp = thread() / 32;
    const int feature = warp / 4 * (Features / 2), token = warp % 4 * 32;
    FXPRUNE_UNROLLED
    for (int k = 0; k < kRows; k += 16) {
      uint32_t b[2][4];
      FXPRUNE_UNROLLED
      for (int j = 0; j < 2; ++j) {
        const int row = k + lane / 8 % 2 * 8 + lane % 8, column = token + 16 * j + lane / 16 * 8;
        load_matrices_transposed(b[j], stage + kWeightBytes + column / kPanel * kHalfPanel +
                                           panel_offset(row, column % kPanel));
      }
      FXPRUNE_UNROLLED
      for (int i = 0; i < kBlocksM; ++i) {
        uint32_t w[4];
        const int row = k + lane / 16 * 8 + lane % 8, column = feature + 16 * i + lane / 8 % 2 * 8;
        load_matrices_transposed(
            w, stage + column / kPanel * kHalfPanel + panel_offset(row, column % kPanel));
        FXPRUNE_UNROLLED
        for (int j = 0; j < 4; ++j) {
          multiply_16x8x16<T>(sums[i][j], w, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  static FXPRUNE_GPU void run(const Args& a) {
    const TileItem item = tile_item(a, block(0), Features, kTokens);
    const Source s(a, item);
    const Window window(a, item.tile, item.image, item.token + thread() % (kTokens / 8) * 8);
    const int stages = static_cast<int>((item.rows + kRows - 1) / kRows);

    float sums[kBlocksM][4][4];
    FXPRUNE_UNROLLED
    for (int i = 0; i < kBlocksM * 16; ++i) sums[i / 16][i / 4 % 4][i % 4] = 0.0f;
    through_ring<kStages, kStageBytes>(
        shared_memory(), stages, [&](int i, char* to) { fill(a, item, s, window, i, to); },
        [&](int, const char* stage) { multiply(stage, sums); });
    finish_fragments<T, kBlocksM>(a, item, Features / 2, sums);
  }
};

}  // namespace fxprune::gpu
