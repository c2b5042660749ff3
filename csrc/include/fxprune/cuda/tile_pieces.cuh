// What the gradients of the tile-wise GEMM and of its implicit convolution share, and the structure
// by which the input's gradient finds its weights.
//
//   dx[b, k, m]  = sum over tiles t that keep k, over features n of t: w[n, k] * g[b, n, m]
//   dw[t, r, n]  = sum over b, m of x[b, k_r, m] * g[b, n, m], for the kept rows k_r of tile t
//
// Under a window K rows are (channel, dy, dx), and dx is summed over the taps of a channel at the
// pixels that each came from. All sums are in float and in a fixed order.
#pragma once

#include "fxprune/cuda/tile_window.cuh"

namespace fxprune::gpu {

constexpr int kPieceRows = 64;
constexpr uint32_t kNoRow = ~0u;

struct TileGradientArgs {
  // The forward's record: its input x (for the weight's gradient), its weights (for the input's
  // gradient), its structure, sizes and window. out is the gradient; vector says that 16-byte
  // accesses to rows of grad, and of x or out, are aligned.
  TileGemmArgs gemm;
  const void* grad;  // (batch, n, m)
  uint32_t* pieces;  // input's gradient: TilePieces
  int32_t* counts;
  int32_t* table;  // weight's gradient: TileTable
  float* partial;  // (parts, nnz), where parts > 1
  int64_t parts, nnz;

  FXPRUNE_BOTH int taps() const {
    return gemm.window.groups > 0 ? gemm.window.kernel_h * gemm.window.kernel_w : 1;
  }
  FXPRUNE_BOTH int64_t groups() const { return gemm.window.groups > 0 ? gemm.window.groups : 1; }
  // Output rows of a group, and the blocks of them.
  FXPRUNE_BOTH int64_t channels() const { return gemm.k / taps(); }
  FXPRUNE_BOTH int64_t channel_blocks() const { return (channels() + kPieceRows - 1) / kPieceRows; }
  // Pixels of a plane of dx.
  FXPRUNE_BOTH int64_t pixels() const {
    return gemm.window.groups > 0 ? int64_t{gemm.window.height} * gemm.window.width : gemm.m;
  }
  FXPRUNE_BOTH int64_t piece_count() const { return gemm.tiles * channel_blocks() * taps(); }
  FXPRUNE_BOTH int64_t piece_at(int64_t tile, int64_t channel_block, int tap) const {
    return (tile * channel_blocks() + channel_block) * taps() + tap;
  }
};

// A tile's kept rows in order of (block of 64 channels, tap, channel). For each block and tap, 64
// entries: those kept, first, as row within the tile * 64 + channel within the block, then kNoRow;
// and how many are kept. A block of threads makes one piece, a thread looks one channel up.
struct TilePieces {
  using Args = TileGradientArgs;
  static constexpr int kThreads = kPieceRows, kBlocks = 8, kSharedBytes = 4 * kThreads;

  static FXPRUNE_GPU void run(const Args& a) {
    const int taps = a.taps();
    const int64_t channel_block = block(0) / taps;
    const int tap = static_cast<int>(block(0) % taps);
    const int64_t channel = channel_block * kPieceRows + thread();
    for (int64_t t = block(1); t < a.gemm.tiles; t += blocks(1)) {
      const int64_t first = load_global<int32_t>(a.gemm.tile_ptr + t),
                    rows = load_global<int32_t>(a.gemm.tile_ptr + t + 1) - first;
      const int64_t row = find(a.gemm.index + first, rows, channel * taps + tap);
      const bool kept = row >= 0 && channel < a.channels();
      store_shared<uint32_t>(shared_memory() + 4 * thread(), kept);
      barrier();
      uint32_t before = 0, all = 0;
      for (int i = 0; i < kThreads; ++i) {
        const uint32_t other = load_shared<uint32_t>(shared_memory() + 4 * i);
        before += i < thread() ? other : 0;
        all += other;
      }
      barrier();
      const int64_t piece = a.piece_at(t, channel_block, tap);
      const uint32_t own = static_cast<uint32_t>(thread());
      const uint32_t place = kept ? before : all + own - before;
      store_global<uint32_t>(a.pieces + piece * kPieceRows + place,
                             kept ? static_cast<uint32_t>(row) * kPieceRows + own : kNoRow);
      if (thread() == 0) store_global<int32_t>(a.counts + piece, static_cast<int32_t>(all));
    }
  }

  // The place of `k` among `rows` increasing numbers, -1 where it is not among them.
  static FXPRUNE_GPU int64_t find(const int32_t* index, int64_t rows, int64_t k) {
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (load_global<int32_t>(index + middle) < k) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low < rows && load_global<int32_t>(index + low) == k ? low : -1;
  }
};

// N pixels of dx in a row, and where the output pixels lie that saw them under a tap.
template <class T, int N>
struct GradientTokens {
  int row[N], column[N];  // in the padded image; far outside past the last pixel
  int out_h, out_w;

  FXPRUNE_GPU GradientTokens(const TileGradientArgs& a, int64_t pixel) {
    const TileWindow& w = a.gemm.window;
    out_w = w.out_w;
    out_h = static_cast<int>(a.gemm.m / w.out_w);
    int y = static_cast<int>(pixel / w.width), x = static_cast<int>(pixel % w.width);
    FXPRUNE_UNROLLED
    for (int j = 0; j < N; ++j) {
      row[j] = pixel + j < a.pixels() ? y + w.pad_h : kOutside;
      column[j] = x + w.pad_w;
      if (++x == w.width) {
        x = 0;
        ++y;
      }
    }
  }

  // The place in a plane of g that pixel j feeds under a tap, -1 where there is none.
  FXPRUNE_GPU int64_t at(const TileWindow& w, int tap, int j) const {
    int y = row[j] - tap / w.kernel_w * w.dilation_h,
        x = column[j] - tap % w.kernel_w * w.dilation_w;
    if (y < 0 || x < 0) return -1;
    if (w.stride_h != 1 || w.stride_w != 1) {
      if (y % w.stride_h != 0 || x % w.stride_w != 0) return -1;
      y /= w.stride_h;
      x /= w.stride_w;
    }
    return y < out_h && x < out_w ? int64_t{y} * out_w + x : -1;
  }

 private:
  static constexpr int kOutside = -(1 << 30);
};

}  // namespace fxprune::gpu
