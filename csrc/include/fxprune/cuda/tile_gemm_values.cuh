// How the kernels of the tile-wise GEMM in float bring weights and tokens to shared memory. They
// read the packed weights as they are.
//
// A stage is kRows rows of K: kFeatures weights, then kTokens tokens, kRowBytes apart.
#pragma once

#include <type_traits>

#include "fxprune/cuda/stage_ring.cuh"
#include "fxprune/cuda/tile_window.cuh"

namespace fxprune::gpu {

// Block: constants kThreads, kFeatures, kTokens, kRows, kRowBytes, kStages, kStageBytes. Windowed:
// the implicit GEMM of a convolution.
template <class Block, bool Windowed>
struct TileValues {
  using Args = TileGemmArgs;
  static constexpr int kThreads = Block::kThreads, kRows = Block::kRows;
  static constexpr int kFeatures = Block::kFeatures, kTokens = Block::kTokens;

  struct Item : TileItem {
    int64_t width;  // features of the tile
    const float *values, *x, *gate;
    const int32_t* index;
    bool wide;  // 16-byte copies reach four features of a row
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
    item.wide =
        (a.granularity | item.width) % 4 == 0 && reinterpret_cast<uintptr_t>(a.values) % 16 == 0;
    return item;
  }

  static int64_t items(const Args& a) {
    const int64_t parts = (a.granularity + kFeatures - 1) / kFeatures;
    return (a.m + kTokens - 1) / kTokens * a.batch * parts * a.tiles;
  }

  // A thread always copies the same token.
  using Tokens = WindowTokens<float, 1>;
  using Source = std::conditional_t<Windowed, Tokens, NoTokens>;
  // Calls work(i, stage) for each stage of an item in shared memory.
  template <class Work>
  static FXPRUNE_GPU void through_stages(const Args& a, const Item& item, const Work& work) {
    const Source source(a, item.tile, item.image, item.token + thread() % kTokens);
    through_ring<Block::kStages, Block::kStageBytes>(
        shared_memory(), static_cast<int>((item.rows + kRows - 1) / kRows),
        [&](int i, char* to) { fill(a, item, source, int64_t{i} * kRows, to); }, work);
  }

 private:
  static FXPRUNE_GPU void fill(const Args& a, const Item& item, const Source& source,
                               int64_t first_row, char* to) {
    if (item.wide) {
      weights<4>(item, first_row, to);
    } else {
      weights<1>(item, first_row, to);
    }
    to += kFeatures * 4;
    if constexpr (Windowed) {
      pixels(a, item, source, first_row, to);
    } else if (a.vector && item.gate == nullptr) {
      tokens<4>(a, item, first_row, to);
    } else {
      tokens<1>(a, item, first_row, to);
    }
  }

  // Calls work(k, column) for this thread's share of a stage, `Step` elements at a time. Single
  // ones are many, and unrolled altogether they would take all registers.
  template <int Columns, int Step, class Work>
  static FXPRUNE_GPU void share(Work work) {
    static_assert(kRows * Columns % (Step * kThreads) == 0, "threads share a stage evenly");
    FXPRUNE_UNROLLED_BY(Step > 1 ? 16 : 4)
    for (int i = 0; i < kRows * Columns / Step / kThreads; ++i) {
      const int at = thread() + i * kThreads;
      work(at / (Columns / Step), at % (Columns / Step) * Step);
    }
  }

  template <int Step>
  static FXPRUNE_GPU void weights(const Item& item, int64_t first_row, char* to) {
    share<kFeatures, Step>([&](int k, int f) {
      const bool real = first_row + k < item.rows && item.first + f < item.width;
      const float* from = item.values + (first_row + k) * item.width + item.first + f;
      copy_async<4 * Step>(to + k * Block::kRowBytes + 4 * f, real ? from : item.values, real);
    });
  }

  template <int Step>
  static FXPRUNE_GPU void tokens(const Args& a, const Item& item, int64_t first_row, char* to) {
    share<kTokens, Step>([&](int k, int column) {
      const bool real = first_row + k < item.rows && item.token + column < a.m;
      const int64_t row = real ? load_global<int32_t>(item.index + first_row + k) : 0;
      const float* from = real ? item.x + row * a.m + column : static_cast<const float*>(a.x);
      char* slot = to + k * Block::kRowBytes + 4 * column;
      if (Step > 1 || item.gate == nullptr) return copy_async<4 * Step>(slot, from, real);
      const float scale = real ? load_global<float>(item.gate + row) : 0.0f;
      store_shared<float>(slot, real ? load_global<float>(from) * scale : 0.0f);
    });
  }

  static FXPRUNE_GPU void pixels(const Args& a, const Item& item, const Source& source,
                                 int64_t first_row, char* to) {
    share<kTokens, 1>([&](int k, int column) {
      const bool real = first_row + k < item.rows && item.token + column < a.m;
      const int32_t row = real ? load_global<int32_t>(item.index + first_row + k) : 0;
      bool inside;
      const float* from = source.at(a.window, Tokens::tap_of(a.window, row), 0, &inside);
      inside = inside && real;
      copy_async<4>(to + k * Block::kRowBytes + 4 * column, inside ? from : source.x, inside);
    });
  }
};

}  // namespace fxprune::gpu
