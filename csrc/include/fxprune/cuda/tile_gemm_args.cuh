// What the GPU kernels of the tile-wise GEMM share: arguments, work items, and the epilogue.
//
//   out[b, n, m] = act(sum over kept k of w[n, k] * gate[b, k] * x[b, k, m] + bias[n] + residual[b,
//   n, m])
//
// Weights are the matrix instruction's first operand and tokens (pixels) its second, so that a row
// of accumulators is an output feature and results come out feature-major without a transpose.
#pragma once

#include "fxprune/activation.h"
#include "fxprune/cuda/activation.cuh"
#include "fxprune/cuda/tile_image.cuh"

namespace fxprune::gpu {

// The window of a convolution whose GEMM this is: K rows are (channel of a group, dy, dx), tokens
// are output pixels. Every tile lies inside one group.
struct TileWindow {
  int64_t channels, groups;
  int height, width, out_w;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

struct TileGemmArgs {
  const void* x;            // (batch, k, m), or (batch, channels, height, width) under a window
  const void* values;       // packed, as the operator gets it
  const void* image;        // TileImage, 16-bit kernels only
  const int32_t* index;     // kept K rows, tile after tile
  const int32_t* tile_ptr;  // tiles + 1
  const int32_t* columns;   // kept output features
  const void* bias;         // (n) or null
  const void* residual;     // (batch, n, m) or null
  const void* gate;         // (batch, k) or null
  void* out;                // (batch, n, m)
  int64_t batch, m, k, n, kept, rows, granularity, tiles;
  Activation activation;
  bool vector;  // 16-byte accesses to rows of x, residual and out are aligned
  bool halved;  // the image is that of weights kept two in four
  bool tf32;    // values, of floats, are rounded to TF32: tensor cores may multiply them
  TileWindow window;

  FXPRUNE_BOTH TileImage layout() const { return {tiles, rows, granularity, halved}; }
};

// One block of results: `features` of a tile from its column `first` on, tokens of one image.
struct TileItem {
  int64_t tile, first, image, token;
  int64_t rows;  // K rows of the tile
};

// Item number i of tiles in the image's order, each in `parts` of `features` output features; the
// tokens of one tile follow each other, so that its weights stay in L2.
FXPRUNE_GPU TileItem tile_item(const TileGemmArgs& a, int64_t i, int features, int tokens) {
  const int64_t token_blocks = (a.m + tokens - 1) / tokens;
  const int64_t parts = a.layout().panels() * kPanel / features;
  TileItem item;
  item.token = i % token_blocks * tokens;
  i /= token_blocks;
  item.image = i % a.batch;
  i /= a.batch;
  item.first = i % parts * features;
  item.tile = load_global<int32_t>(static_cast<const int32_t*>(a.image) + i / parts);
  item.rows = load_global<int32_t>(a.tile_ptr + item.tile + 1) -
              load_global<int32_t>(a.tile_ptr + item.tile);
  return item;
}

FXPRUNE_BOTH int64_t tile_items(const TileGemmArgs& a, int features, int tokens) {
  return (a.m + tokens - 1) / tokens * a.batch * (a.layout().panels() * kPanel / features) *
         a.tiles;
}

// First block of the item's weights in the image.
FXPRUNE_GPU const char* item_blocks(const TileGemmArgs& a, const TileItem& item) {
  const int32_t* table = static_cast<const int32_t*>(a.image);
  const int64_t before = load_global<int32_t>(table + a.tiles + item.tile);
  return static_cast<const char*>(a.image) + a.layout().table_bytes() +
         before * a.layout().block_bytes() + item.first / kPanel * a.layout().panel_bytes();
}

// What a block of results is made of.
template <class T>
struct TileSource {
  const char* weights;   // the item's blocks
  const int32_t* index;  // of the tile
  const T* x;            // the image's rows, at the item's first token
  const T* gate;         // of the image, or null
  int64_t tokens;        // that exist from there on

  FXPRUNE_GPU TileSource(const TileGemmArgs& a, const TileItem& item)
      : weights(item_blocks(a, item)),
        index(a.index + load_global<int32_t>(a.tile_ptr + item.tile)),
        x(static_cast<const T*>(a.x) + item.image * a.k * a.m + item.token),
        gate(a.gate == nullptr ? nullptr : static_cast<const T*>(a.gate) + item.image * a.k),
        tokens(a.m - item.token) {}
};

// Gives each lane of four neighbours (t = lane%4) eight columns in a row: of v[4][2], columns
// (8j + 2t, 8j + 2t + 1) for j = 0..3, it makes out[8], columns 8t .. 8t+7. A 4x4 transpose of
// pairs.
FXPRUNE_GPU void gather_columns(const float (&v)[4][2], float (&out)[8]) {
  const int t = thread() % 4;
  float pair[4][2];
  FXPRUNE_UNROLLED
  for (int i = 0; i < 2; ++i) {
    // Exchange between lanes t and t^1: the one keeps even blocks, the other odd ones.
    FXPRUNE_UNROLLED
    for (int j = 0; j < 4; j += 2) {
      const bool odd = t & 1;
      const float other = shuffle_xor(odd ? v[j][i] : v[j + 1][i], 1);
      pair[j][i] = odd ? other : v[j][i];
      pair[j + 1][i] = odd ? v[j + 1][i] : other;
    }
  }
  // Now pair[j], pair[j+1] are the pairs of lanes t&~1, t|1 in block j + (t & 1).
  FXPRUNE_UNROLLED
  for (int i = 0; i < 2; ++i) {
    FXPRUNE_UNROLLED
    for (int j = 0; j < 2; ++j) {
      const bool upper = t & 2;
      const float other = shuffle_xor(upper ? pair[j][i] : pair[j + 2][i], 2);
      out[2 * j + i] = upper ? other : pair[j][i];
      out[2 * (j + 2) + i] = upper ? pair[j + 2][i] : other;
    }
  }
}

// Eight tokens from `column` on of K row `row` into 16 bytes of shared memory, as zeros where they
// are not `real` or past the last of `tokens`. x: the image's rows at token 0; gate: of the image,
// or null.
template <class T>
FXPRUNE_GPU void copy_tokens(const TileGemmArgs& a, const T* x, const T* gate, int64_t row,
                             int column, int64_t tokens, bool real, char* to) {
  const T* from = x + row * a.m + column;
  if (a.vector && gate == nullptr) return copy_async<16>(to, real ? from : x, real);
  const float scale = real && gate != nullptr ? to_float(load_global<T>(gate + row)) : 1.0f;
  uint16_t element[8];
  FXPRUNE_UNROLLED
  for (int j = 0; j < 8; ++j) {
    element[j] = 0;
    if (real && column + j < tokens) {
      const T value = load_global<T>(from + j);
      element[j] = gate == nullptr ? value.bits : from_float<T>(to_float(value) * scale).bits;
    }
  }
  store_shared<Quad>(to, quad_of(element));
}

// The output feature in column `column` of the item's tile, -1 behind its last one.
FXPRUNE_GPU int64_t feature_of(const TileGemmArgs& a, const TileItem& item, int64_t column) {
  const int64_t at = item.tile * a.granularity + column;
  if (column >= a.granularity || at >= a.kept) return -1;
  return load_global<int32_t>(a.columns + at);
}

// Finishes the first `count` of eight results in a row of output feature `feature`, from element
// `start` of the output on.
template <class T>
FXPRUNE_GPU void finish_run(const TileGemmArgs& a, int64_t feature, int64_t start, int64_t count,
                            float (&v)[8]) {
  constexpr int kPack = Pack<T>::kCount;
  if (a.bias != nullptr) {
    const float bias = to_float(load_global<T>(static_cast<const T*>(a.bias) + feature));
    FXPRUNE_UNROLLED
    for (int i = 0; i < 8; ++i) v[i] += bias;
  }
  if (a.residual != nullptr) {
    const T* residual = static_cast<const T*>(a.residual) + start;
    if (a.vector) {
      FXPRUNE_UNROLLED
      for (int i = 0; i < 8; i += kPack) {
        if (i >= count) continue;
        float part[kPack];
        Pack<T>::unpack(load_global<Quad>(residual + i), part);
        FXPRUNE_UNROLLED
        for (int j = 0; j < kPack; ++j) v[i + j] += part[j];
      }
    } else {
      FXPRUNE_UNROLLED
      for (int i = 0; i < 8; ++i) {
        if (i < count) v[i] += to_float(load_global<T>(residual + i));
      }
    }
  }
  activate(a.activation, v);
  T* out = static_cast<T*>(a.out) + start;
  if (a.vector) {
    FXPRUNE_UNROLLED
    for (int i = 0; i < 8; i += kPack) {
      if (i < count) store_global<Quad>(out + i, Pack<T>::pack(v + i));
    }
  } else {
    FXPRUNE_UNROLLED
    for (int i = 0; i < 8; ++i) {
      if (i < count) store_global<T>(out + i, from_float<T>(v[i]));
    }
  }
}

// The same for eight tokens from `token` on of the feature in column `column` of the tile.
template <class T>
FXPRUNE_GPU void finish_tokens(const TileGemmArgs& a, const TileItem& item, int64_t column,
                               int64_t token, float (&v)[8]) {
  const int64_t feature = feature_of(a, item, column);
  if (feature < 0 || token >= a.m) return;
  finish_run<T>(a, feature, (item.image * a.n + feature) * a.m + token, a.m - token, v);
}

// The same for the accumulators of mma.sync: `BlocksM` blocks of 16 features by 32 tokens for each
// of 8 warps, 4 along tokens and 2 along features, `features` of them apart.
template <class T, int BlocksM>
FXPRUNE_GPU void finish_fragments(const TileGemmArgs& a, const TileItem& item, int features,
                                  const float (&sums)[BlocksM][4][4]) {
  const int lane = thread() % 32, warp = thread() / 32;
  FXPRUNE_UNROLLED
  for (int i = 0; i < BlocksM; ++i) {
    FXPRUNE_UNROLLED
    for (int half = 0; half < 2; ++half) {
      float v[4][2], tokens[8];
      FXPRUNE_UNROLLED
      for (int j = 0; j < 8; ++j) v[j / 2][j % 2] = sums[i][j / 2][2 * half + j % 2];
      gather_columns(v, tokens);
      const int64_t column = item.first + warp / 4 * features + 16 * i + 8 * half + lane / 4;
      finish_tokens<T>(a, item, column, item.token + warp % 4 * 32 + lane % 4 * 8, tokens);
    }
  }
}

// Output features that no tile holds: act(bias + residual). One thread an element of them.
template <class T>
struct TileRest {
  using Args = TileGemmArgs;
  static constexpr int kThreads = 256, kBlocks = 4;

  static FXPRUNE_GPU void run(const Args& a) {
    // Feature block(1) + i*blocks(1): kept ones are left alone. columns increase, so search them.
    for (int64_t feature = block(1); feature < a.n; feature += blocks(1)) {
      int64_t low = 0, high = a.kept;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (load_global<int32_t>(a.columns + middle) < feature) {
          low = middle + 1;
        } else {
          high = middle;
        }
      }
      if (low < a.kept && load_global<int32_t>(a.columns + low) == feature) continue;
      const float bias = a.bias == nullptr
                             ? 0.0f
                             : to_float(load_global<T>(static_cast<const T*>(a.bias) + feature));
      for (int64_t i = block(0) * kThreads + thread(); i < a.batch * a.m;
           i += blocks(0) * kThreads) {
        const int64_t at = (i / a.m * a.n + feature) * a.m + i % a.m;
        float v[1] = {bias};
        if (a.residual != nullptr) {
          v[0] += to_float(load_global<T>(static_cast<const T*>(a.residual) + at));
        }
        activate(a.activation, v);
        store_global<T>(static_cast<T*>(a.out) + at, from_float<T>(v[0]));
      }
    }
  }
};

template <class T, class Launcher>
void tile_rest(Launcher& launcher, const TileGemmArgs& a) {
  if (a.kept == a.n) return;
  const int64_t grid[3] = {(a.batch * a.m + 1023) / 1024, a.n < 65535 ? a.n : 65535, 1};
  launcher.template launch<TileRest<T>>(grid, 0, a);
}

}  // namespace fxprune::gpu
