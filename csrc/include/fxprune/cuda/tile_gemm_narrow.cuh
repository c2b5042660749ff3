// Tile-wise GEMM for tiles of few output features (1 for single elements), where a tensor core
// would multiply mostly padding: on the ordinary cores, sums in float.
//
// A thread computes up to 8 features of one tile x 8 tokens, K row by K row: 16-byte loads of x
// where rows allow them, weights from the packed values or from the image. Lanes go along tokens;
// where there are fewer tokens than that, a block takes several tiles.
#pragma once

#include "fxprune/cuda/tile_gemm_args.cuh"

namespace fxprune::gpu {

template <class T>
struct TileGemmNarrow {
  using Args = TileGemmArgs;
  static constexpr int kThreads = 128, kBlocks = 4, kFeatures = 8, kTokens = 8;
  static constexpr int kPack = Pack<T>::kCount;

  // Threads of a block along tokens: a power of two.
  static FXPRUNE_BOTH int lanes_of(int64_t m) {
    int lanes = 1;
    while (lanes < kThreads && lanes * kTokens < m) lanes *= 2;
    return lanes;
  }
  static FXPRUNE_BOTH int64_t token_blocks(int64_t m) {
    const int64_t tokens = int64_t{lanes_of(m)} * kTokens;
    return (m + tokens - 1) / tokens;
  }
  static FXPRUNE_BOTH int64_t tile_groups(const Args& a) {
    const int64_t tiles = kThreads / lanes_of(a.m);
    return (a.tiles + tiles - 1) / tiles;
  }

  // The weights of one tile.
  struct Weights {
    const char* image;
    const float* values;
    int64_t block_bytes, width;

    FXPRUNE_GPU Weights(const Args& a, const TileItem& item, int64_t from) {
      const int64_t left_over = a.kept - item.tile * a.granularity;
      width = left_over < a.granularity ? left_over : a.granularity;
      if constexpr (sizeof(T) == 4) {
        values = static_cast<const float*>(a.values) + from * a.granularity;
      } else {
        image = item_blocks(a, item);
        block_bytes = a.layout().block_bytes();
      }
    }
    FXPRUNE_GPU float at(int64_t row, int feature) const {
      if constexpr (sizeof(T) == 4) {
        return load_global<float>(values + row * width + feature);
      } else {
        const int within = panel_offset(static_cast<int>(row % kBlockRows), feature);
        return to_float(load_global<T>(image + row / kBlockRows * block_bytes + within));
      }
    }
  };

  static FXPRUNE_GPU void load_tokens(const Args& a, const T* x, int64_t count,
                                      float (&v)[kTokens]) {
    if (a.vector) {
      FXPRUNE_UNROLLED
      for (int i = 0; i < kTokens; i += kPack) {
        float part[kPack] = {};
        if (i < count) Pack<T>::unpack(load_global<Quad>(x + i), part);
        FXPRUNE_UNROLLED
        for (int j = 0; j < kPack; ++j) v[i + j] = part[j];
      }
    } else {
      FXPRUNE_UNROLLED
      for (int i = 0; i < kTokens; ++i) v[i] = i < count ? to_float(load_global<T>(x + i)) : 0.0f;
    }
  }

  static FXPRUNE_GPU void run(const Args& a) {
    const int lanes = lanes_of(a.m);
    int64_t i = block(0);
    TileItem item;
    item.token = (i % token_blocks(a.m) * lanes + thread() % lanes) * kTokens;
    i /= token_blocks(a.m);
    item.image = i % a.batch;
    item.tile = i / a.batch * (kThreads / lanes) + thread() / lanes;
    item.first = 0;
    if (item.tile >= a.tiles || item.token >= a.m) return;
    const int64_t from = load_global<int32_t>(a.tile_ptr + item.tile);
    item.rows = load_global<int32_t>(a.tile_ptr + item.tile + 1) - from;
    const Weights weights(a, item, from);
    const T* x = static_cast<const T*>(a.x) + item.image * a.k * a.m + item.token;
    const T* gate = a.gate == nullptr ? nullptr : static_cast<const T*>(a.gate) + item.image * a.k;
    float sums[kFeatures][kTokens];
    FXPRUNE_UNROLLED
    for (int j = 0; j < kFeatures * kTokens; ++j) sums[j / kTokens][j % kTokens] = 0.0f;
    for (int64_t r = 0; r < item.rows; ++r) {
      const int64_t row = load_global<int32_t>(a.index + from + r);
      float v[kTokens];
      load_tokens(a, x + row * a.m, a.m - item.token, v);
      if (gate != nullptr) {
        const float scale = to_float(load_global<T>(gate + row));
        FXPRUNE_UNROLLED
        for (int j = 0; j < kTokens; ++j) v[j] = to_float(from_float<T>(v[j] * scale));
      }
      FXPRUNE_UNROLLED
      for (int f = 0; f < kFeatures; ++f) {
        if (f < weights.width) {
          const float w = weights.at(r, f);
          FXPRUNE_UNROLLED
          for (int j = 0; j < kTokens; ++j) sums[f][j] += w * v[j];
        }
      }
    }
    FXPRUNE_UNROLLED
    for (int f = 0; f < kFeatures; ++f) finish_tokens<T>(a, item, f, item.token, sums[f]);
  }
};

// True for tiles that the kernel takes: a tensor core that pads 3 features to 64 is no slower.
template <class T>
bool is_narrow(const TileGemmArgs& a) {
  return a.granularity <= (sizeof(T) == 4 ? TileGemmNarrow<T>::kFeatures : 2);
}

template <class T, class Launcher>
void tile_gemm_narrow(Launcher& launcher, const TileGemmArgs& a) {
  using Kernel = TileGemmNarrow<T>;
  const int64_t grid[3] = {Kernel::token_blocks(a.m) * a.batch * Kernel::tile_groups(a), 1, 1};
  launcher.template launch<Kernel>(grid, 0, a);
}

}  // namespace fxprune::gpu
