// Tile-wise GEMM on wgmma: sm_90a, 16-bit elements, sums in float.
//
// A block computes Features (128 or 256) x 128 tokens at a time and takes items until none are left
// (tiles with the most K rows first, so that the last ones to end are short). K goes by in stages
// of 64 rows through a ring in shared memory:
//
// - Warpgroup 0 produces. One thread copies the weights of a stage, which lie in the image as
//   shared memory wants them, by bulk copies; all 128 gather the rows of x by cp.async. A stage's
//   `full` mbarrier hears of the bulk copies from the copy engine, and from each thread once its
//   copies have landed and are fenced for wgmma; that is kLag stages after they were started.
// - Warpgroups 1 and 2 multiply, each half the features, one stage's instructions behind the
//   other's, and give a stage back through its `empty` mbarrier, one arrival a warp.
//
// The producer runs ahead into the next item while the consumers finish the last one. Rows of x
// must allow 16-byte copies, and there is no gate. Windowed: the implicit GEMM of a convolution,
// whose pixels the producer gathers through its registers; a stage is announced at once.
#pragma once

#include <type_traits>

#include "fxprune/cuda/hopper.cuh"
#include "fxprune/cuda/tile_window.cuh"

namespace fxprune::gpu {

template <class T, int Features, bool Windowed>
struct TileGemmWgmma {
  using Args = TileGemmArgs;
  static constexpr int kThreads = 384, kBlocks = 1;
  static constexpr int kTokens = 128, kStages = 4, kLag = 2;
  static constexpr int kPanels = Features / kPanel, kBlocksM = Features / 128;
  static constexpr int kWeightBytes = kPanels * kPanelBytes;
  static constexpr int kStageBytes = kWeightBytes + kTokens / kPanel * kPanelBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes + kStages * 16;
  static constexpr int kProducers = 128, kConsumerWarps = 8;
  // Registers of a thread that produces, and of one that consumes. A block takes no more than it
  // started with, which is 64 Ki over its threads in steps of 8: a warp would wait for others
  // forever.
  static constexpr int kProducing = Windowed ? 120 : 56, kConsuming = Windowed ? 192 : 224;
  static_assert(kProducing + 2 * kConsuming <= 3 * (65536 / kThreads / 8 * 8),
                "too many registers");

  // A thread of the producer always gathers the same eight tokens of an item.
  using Window = std::conditional_t<Windowed, WindowTokens<T, 8>, NoTokens>;

  static FXPRUNE_GPU char* full(int stage) {
    return shared_memory() + kStages * kStageBytes + stage * 16;
  }
  static FXPRUNE_GPU char* empty(int stage) { return full(stage) + 8; }

  // A place in the ring and the parity of its current phase.
  struct Ring {
    int stage = 0, parity = 0;
    FXPRUNE_GPU void next() {
      if (++stage == kStages) {
        stage = 0;
        parity ^= 1;
      }
    }
  };

  // The copies of stages that have landed are announced to the consumers.
  static FXPRUNE_GPU void announce(Ring* landed) {
    fence_proxy();
    mbarrier_arrive(full(landed->stage));
    landed->next();
  }

  static FXPRUNE_GPU void produce(const Args& a, int64_t items) {
    constexpr int kChunks = kBlockRows * kTokens / 8 / kProducers;  // of 16 bytes, per thread
    constexpr int kRowStep = kProducers / (kTokens / 8);            // K rows between them
    Ring fill, landed;
    int ahead = 0;
    const int column = thread() % (kTokens / 8) * 8, first_row = thread() / (kTokens / 8);
    const int column_bytes = column / kPanel * kPanelBytes;
    for (int64_t i = block(0); i < items; i += blocks(0)) {
      const TileItem item = tile_item(a, i, Features, kTokens);
      const char* weights = item_blocks(a, item);
      const int32_t* index = a.index + load_global<int32_t>(a.tile_ptr + item.tile);
      const Window window(a, item.tile, item.image, item.token + column);
      const T* x = static_cast<const T*>(a.x) + item.image * a.k * a.m + item.token;
      const bool inside = item.token + column < a.m;
      int32_t rows[kChunks];  // of the next stage, asked for ahead
      load_rows(item, index, first_row, rows);
      for (int64_t base = 0; base < item.rows; base += kBlockRows) {
        mbarrier_wait(empty(fill.stage), fill.parity ^ 1);
        char* stage = shared_memory() + fill.stage * kStageBytes;
        if (thread() == 0) {
          mbarrier_arrive_expect(full(fill.stage), kWeightBytes);
          copy_bulk(stage, weights, kWeightBytes, full(fill.stage));
        }
        weights += a.layout().block_bytes();
        char* tokens = stage + kWeightBytes + column_bytes;
        if constexpr (Windowed) {
          FXPRUNE_UNROLLED
          for (int c = 0; c < kChunks; ++c) {
            const int k = first_row + c * kRowStep;
            window.copy(a.window, rows[c], base + k < item.rows,
                        tokens + panel_offset(k, column % kPanel));
          }
          announce(&fill);
          load_rows(item, index, base + kBlockRows + first_row, rows);
          continue;
        }
        FXPRUNE_UNROLLED
        for (int c = 0; c < kChunks; ++c) {
          const int k = first_row + c * kRowStep;
          const bool real = inside && base + k < item.rows;
          const T* from = real ? x + int64_t{rows[c]} * a.m + column : x;
          copy_async<16>(tokens + panel_offset(k, column % kPanel), from, real);
        }
        copy_commit();
        load_rows(item, index, base + kBlockRows + first_row, rows);
        fill.next();
        if (++ahead > kLag) {
          copy_wait<kLag>();
          announce(&landed);
          --ahead;
        }
      }
    }
    copy_wait<0>();
    for (; ahead > 0; --ahead) announce(&landed);
  }

  // The K rows this thread copies in the stage that begins at `first` less its own offset.
  template <int N>
  static FXPRUNE_GPU void load_rows(const TileItem& item, const int32_t* index, int64_t first,
                                    int32_t (&rows)[N]) {
    FXPRUNE_UNROLLED
    for (int c = 0; c < N; ++c) {
      const int64_t k = first + c * (kProducers / (kTokens / 8));
      rows[c] = k < item.rows ? load_global<int32_t>(index + k) : 0;
    }
  }

  static FXPRUNE_GPU void consume(const Args& a, int64_t items) {
    const int group = thread() / 128 - 1, warp = thread() / 32 % 4, lane = thread() % 32;
    Ring ring;
    for (int64_t i = block(0); i < items; i += blocks(0)) {
      const TileItem item = tile_item(a, i, Features, kTokens);
      const int stages = static_cast<int>(tile_blocks(item.rows));
      float sums[kBlocksM][64];
      FXPRUNE_UNROLLED
      for (int j = 0; j < kBlocksM * 64; ++j) sums[j / 64][j % 64] = 0.0f;
      int previous = 0;
      for (int s = 0; s < stages; ++s) {
        mbarrier_wait(full(ring.stage), ring.parity);
        const char* stage = shared_memory() + ring.stage * kStageBytes;
        const uint32_t weights =
            shared_address(stage) + static_cast<uint32_t>(group * kBlocksM * kPanelBytes);
        const uint32_t tokens = shared_address(stage) + static_cast<uint32_t>(kWeightBytes);
        FXPRUNE_UNROLLED
        for (int b = 0; b < kBlocksM; ++b) product_pin(sums[b]);
        product_fence();
        FXPRUNE_UNROLLED
        for (int k = 0; k < kBlockRows; k += 16) {
          const uint64_t right = matrix_descriptor(tokens + k * 128, kPanelBytes);
          FXPRUNE_UNROLLED
          for (int b = 0; b < kBlocksM; ++b) {
            const uint64_t left =
                matrix_descriptor(weights + b * kPanelBytes + k * 128, kPanelBytes);
            multiply_64x128x16<T>(sums[b], left, right, true);
          }
        }
        product_commit();
        FXPRUNE_UNROLLED
        for (int b = 0; b < kBlocksM; ++b) product_pin(sums[b]);
        // The instructions of the stage before are over; its memory may be filled again.
        product_wait<1>();
        if (s > 0 && lane == 0) mbarrier_arrive(empty(previous));
        previous = ring.stage;
        ring.next();
      }
      product_wait<0>();
      FXPRUNE_UNROLLED
      for (int b = 0; b < kBlocksM; ++b) product_pin(sums[b]);
      if (stages > 0 && lane == 0) mbarrier_arrive(empty(previous));
      FXPRUNE_UNROLLED
      for (int b = 0; b < kBlocksM; ++b) {
        FXPRUNE_UNROLLED
        for (int part = 0; part < 8; ++part) {
          const int half = part % 2, quarter = part / 2;
          float v[4][2], out[8];
          FXPRUNE_UNROLLED
          for (int j = 0; j < 8; ++j) {
            v[j / 2][j % 2] = sums[b][(4 * quarter + j / 2) * 4 + 2 * half + j % 2];
          }
          gather_columns(v, out);
          const int64_t column =
              item.first + (group * kBlocksM + b) * 64 + warp * 16 + 8 * half + lane / 4;
          finish_tokens<T>(a, item, column, item.token + quarter * 32 + lane % 4 * 8, out);
        }
      }
    }
  }

  // The code for other GPUs holds an empty kernel, which is never started.
  static FXPRUNE_GPU void run(const Args& a) {
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    const int64_t items = tile_items(a, Features, kTokens);
    if (thread() == 0) {
      for (int i = 0; i < kStages; ++i) {
        mbarrier_init(full(i), kProducers + 1);
        mbarrier_init(empty(i), kConsumerWarps);
      }
      mbarrier_init_fence();
    }
    barrier();
    if (thread() < kProducers) {
      registers_release<kProducing>();
      produce(a, items);
    } else {
      registers_acquire<kConsuming>();
      consume(a, items);
    }
#endif
  }
};

}  // namespace fxprune::gpu
