// Tile-wise GEMM in float, on the ordinary cores: full fp32 accuracy, any GPU. Reads the packed
// weights as they are.
//
// A block of 256 threads computes 64 features x 64 tokens, a thread 4 x 4 of them; K goes by in
// stages of 16 rows, three of them in flight. Windowed: the implicit GEMM of a convolution.
#pragma once

#include "fxprune/cuda/tile_gemm_values.cuh"

namespace fxprune::gpu {

template <bool Windowed>
struct TileGemmFfma {
  using Args = TileGemmArgs;
  static constexpr int kThreads = 256, kBlocks = 2;
  static constexpr int kFeatures = 64, kTokens = 64, kRows = 16, kStages = 3;
  static constexpr int kRowBytes = (kFeatures + kTokens) * 4;
  static constexpr int kStageBytes = kRows * kRowBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;

  using Values = TileValues<TileGemmFfma, Windowed>;
  using Item = typename Values::Item;

  static FXPRUNE_GPU void run(const Args& a) {
    const Item item = Values::item_of(a, block(0));
    if (item.first >= item.width) return;
    const int tx = thread() % 16, ty = thread() / 16;
    float sums[4][4];
    FXPRUNE_UNROLLED
    for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = 0.0f;
    const auto multiply = [&](int, const char* stage) {
      FXPRUNE_UNROLLED
      for (int k = 0; k < kRows; ++k) {
        float w[4], x[4];
        Pack<float>::unpack(load_shared<Quad>(stage + k * kRowBytes + 16 * ty), w);
        Pack<float>::unpack(load_shared<Quad>(stage + k * kRowBytes + kFeatures * 4 + 16 * tx), x);
        FXPRUNE_UNROLLED
        for (int j = 0; j < 16; ++j) sums[j / 4][j % 4] += w[j / 4] * x[j % 4];
      }
    };
    Values::through_stages(a, item, multiply);
    FXPRUNE_UNROLLED
    for (int i = 0; i < 4; ++i) {
      finish(a, item, item.first + 4 * ty + i, item.token + 4 * tx, sums[i]);
    }
  }

  static FXPRUNE_GPU void finish(const Args& a, const Item& item, int64_t column, int64_t token,
                                 float (&v)[4]) {
    if (column >= item.width) return;
    const int64_t feature = load_global<int32_t>(a.columns + item.tile * a.granularity + column);
    const int64_t start = (item.image * a.n + feature) * a.m + token;
    const float bias =
        a.bias == nullptr ? 0.0f : load_global<float>(static_cast<const float*>(a.bias) + feature);
    FXPRUNE_UNROLLED
    for (int i = 0; i < 4; ++i) {
      v[i] += bias;
      if (a.residual != nullptr && token + i < a.m) {
        v[i] += load_global<float>(static_cast<const float*>(a.residual) + start + i);
      }
    }
    activate(a.activation, v);
    float* out = static_cast<float*>(a.out) + start;
    if (a.vector && token < a.m) {
      store_global<Quad>(out, Pack<float>::pack(v));
    } else {
      FXPRUNE_UNROLLED
      for (int i = 0; i < 4; ++i) {
        if (token + i < a.m) store_global<float>(out + i, v[i]);
      }
    }
  }
};

}  // namespace fxprune::gpu
