// Tile-wise GEMM in float on mma.sync with TF32 operands (10 bits behind the point, as bfloat16 has
// 7): sm_80 and later, sums in float. The packed weights are rounded already, tokens are rounded on
// their way from shared memory.
//
// A block of 8 warps computes Features (64 or 128) x 128 tokens; K goes by in stages of 16 rows,
// three of them in flight. Rows of a stage lie 32 bytes further apart than they are long, so that a
// warp reads its operands, four rows of eight elements, from all banks at once.
#pragma once

#include "fxprune/cuda/tile_gemm_values.cuh"

namespace fxprune::gpu {

template <int Features, bool Windowed>
struct TileGemmTf32 {
  using Args = TileGemmArgs;
  static constexpr int kThreads = 256, kBlocks = Features == 128 ? 1 : 2;
  static constexpr int kFeatures = Features, kTokens = 128, kRows = 16, kStages = 3;
  static constexpr int kRowBytes = (kFeatures + kTokens) * 4 + 32;
  static constexpr int kStageBytes = kRows * kRowBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;
  // Warps: 4 along tokens, 2 along features; of each 32 tokens and half the features.
  static constexpr int kBlocksM = Features / 32;  // 16-row blocks of a warp

  using Values = TileValues<TileGemmTf32, Windowed>;

  static FXPRUNE_GPU void multiply(const char* stage, float (&sums)[kBlocksM][4][4]) {
    const int lane = thread() % 32, warp = thread() / 32;
    const int feature = warp / 4 * (Features / 2) + lane / 4;
    const int token = Features + warp % 4 * 32 + lane / 4;
    FXPRUNE_UNROLLED
    for (int k = 0; k < kRows; k += 8) {
      const char* row = stage + (k + lane % 4) * kRowBytes;
      uint32_t x[4][2];
      FXPRUNE_UNROLLED
      for (int j = 0; j < 8; ++j) {
        x[j / 2][j % 2] =
            round_tf32(load_shared<float>(row + j % 2 * 4 * kRowBytes + 4 * (token + j / 2 * 8)));
      }
      FXPRUNE_UNROLLED
      for (int i = 0; i < kBlocksM; ++i) {
        uint32_t w[4];
        FXPRUNE_UNROLLED
        for (int j = 0; j < 4; ++j) {
          w[j] = load_shared<uint32_t>(row + j / 2 * 4 * kRowBytes +
                                       4 * (feature + 16 * i + j % 2 * 8));
        }
        FXPRUNE_UNROLLED
        for (int j = 0; j < 4; ++j) multiply_16x8x8(sums[i][j], w, x[j][0], x[j][1]);
      }
    }
  }

  static FXPRUNE_GPU void run(const Args& a) {
    const auto item = Values::item_of(a, block(0));
    if (item.first >= item.width) return;
    float sums[kBlocksM][4][4];
    FXPRUNE_UNROLLED
    for (int i = 0; i < kBlocksM * 16; ++i) sums[i / 16][i / 4 % 4][i % 4] = 0.0f;
    Values::through_stages(a, item, [&](int, const char* stage) { multiply(stage, sums); });
    finish_fragments<float, kBlocksM>(a, item, Features / 2, sums);
  }
};

}  // namespace fxprune::gpu
