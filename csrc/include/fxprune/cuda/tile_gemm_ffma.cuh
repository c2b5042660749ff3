// Tile-wise GEMM in float, on the ordinary cores: full fp32 accuracy, any GPU. Reads the packed
// weights as they are.
//
// A block of 256 threads computes 64 features x 64 tokens, a thread 4 x 4 of them; K goes by in
// stages of 16 rows, three of them in flight. Windowed: the implicit GEMM of a convolution.
#pragma once

#include <type_traits>

#include "fxprune/cuda/tile_window.cuh"

namespace fxprune::gpu {

template <bool Windowed>
struct TileGemmFfma {
  using Args = TileGemmArgs;
  static constexpr int kThreads = 256, kBlocks = 2;
  static constexpr int kFeatures = 64, kTokens = 64, kRows = 16, kStages = 3;
  static constexpr int kRowBytes = (kFeatures + kTokens) * 4;
  static constexpr int kStageBytes = kRows * kRowBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;

  struct Item {
    int64_t tile, first, image, token, rows, width;  // width: features of the tile from `first` on
    const float *values, *x, *gate;
    const int32_t* index;
  };

  static FXPRUNE_GPU Item item_of(const Args& a, int64_t i) {
    const int64_t token_blocks = (a.m + kTokens - 1) / kTokens;
    const int64_t parts = (a.granularity + kFeatures - 1) / kFeatures;
    Item item;
    item.token = i % token_blocks * kTokens;
    i /= token_blocks;
    item.image = i % a.batch;
    i /= a.batch;
    item.first = i % parts * kFeatures;
    item.tile = i / parts;
    const int64_t from = load_global<int32_t>(a.tile_ptr + item.tile);
    item.rows = load_global<int32_t>(a.tile_ptr + item.tile + 1) - from;
    const int64_t left_over = a.kept - item.tile * a.granularity;
    item.width = left_over < a.granularity ? left_over : a.granularity;
    item.values = static_cast<const float*>(a.values) + from * a.granularity;
    item.index = a.index + from;
    item.x = static_cast<const float*>(a.x) + item.image * a.k * a.m + item.token;
    item.gate = a.gate == nullptr ? nullptr : static_cast<const float*>(a.gate) + item.image * a.k;
    return item;
  }

  // A thread always copies the same token.
  using Tokens = WindowTokens<float, 1>;
  using Source = std::conditional_t<Windowed, Tokens, NoTokens>;

  static FXPRUNE_GPU void fill(const Args& a, const Item& item, const Source& source,
                               int64_t first_row, char* to) {
    FXPRUNE_UNROLLED
    for (int i = 0; i < kRows * kFeatures / kThreads; ++i) {
      const int at = thread() + i * kThreads, k = at / kFeatures, f = at % kFeatures;
      const bool real = first_row + k < item.rows && item.first + f < item.width;
      const float* from = item.values + (first_row + k) * item.width + item.first + f;
      copy_async<4>(to + k * kRowBytes + 4 * f, real ? from : item.values, real);
    }
    char* tokens = to + kFeatures * 4;
    FXPRUNE_UNROLLED
    for (int i = 0; i < kRows * kTokens / kThreads; ++i) {
      const int at = thread() + i * kThreads, k = at / kTokens, column = at % kTokens;
      const bool real = first_row + k < item.rows && item.token + column < a.m;
      const int64_t row = real ? load_global<int32_t>(item.index + first_row + k) : 0;
      char* slot = tokens + k * kRowBytes + 4 * column;
      if constexpr (Windowed) {
        bool inside;
        const float* at =
            source.at(a.window, Tokens::tap_of(a.window, static_cast<int32_t>(row)), 0, &inside);
        inside = inside && real;
        copy_async<4>(slot, inside ? at : source.x, inside);
        continue;
      }
      const float* from = real ? item.x + row * a.m + column : static_cast<const float*>(a.x);
      if (item.gate == nullptr) {
        copy_async<4>(slot, from, real);
      } else {
        const float value =
            real ? load_global<float>(from) * load_global<float>(item.gate + row) : 0.0f;
        store_shared<float>(slot, value);
      }
    }
  }

  static FXPRUNE_GPU void run(const Args& a) {
    const Item item = item_of(a, block(0));
    if (item.first >= item.width) return;
    const Source source(a, item.tile, item.image, item.token + thread() % kTokens);
    const int stages = static_cast<int>((item.rows + kRows - 1) / kRows);
    const int tx = thread() % 16, ty = thread() / 16;
    float sums[4][4];
    FXPRUNE_UNROLLED
    for (int i = 0; i < 16; ++i) sums[i / 4][i % 4] = 0.0f;
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < stages) fill(a, item, source, int64_t{i} * kRows, shared_memory() + i * kStageBytes);
      copy_commit();
    }
    for (int i = 0; i < stages; ++i) {
      copy_wait<kStages - 2>();
      barrier();
      const int next = i + kStages - 1;
      if (next < stages) {
        fill(a, item, source, int64_t{next} * kRows,
             shared_memory() + next % kStages * kStageBytes);
      }
      copy_commit();
      const char* stage = shared_memory() + i % kStages * kStageBytes;
      FXPRUNE_UNROLLED
      for (int k = 0; k < kRows; ++k) {
        float w[4], x[4];
        Pack<float>::unpack(load_shared<Quad>(stage + k * kRowBytes + 16 * ty), w);
        Pack<float>::unpack(load_shared<Quad>(stage + k * kRowBytes + kFeatures * 4 + 16 * tx), x);
        FXPRUNE_UNROLLED
        for (int j = 0; j < 16; ++j) sums[j / 4][j % 4] += w[j / 4] * x[j % 4];
      }
    }
    copy_wait<0>();
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
