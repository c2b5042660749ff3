// A depthwise convolution and the 1x1 convolution that reads it, in one kernel: what lies between
// them stays in shared memory.
//
//   out = act(W * act_dw(depthwise_taps(x) + bias_dw) + bias + residual)
//
// A block computes 8x8 output pixels of one image, all output features. First it fills the resident
// panel, a row of 64 pixels (128 bytes) per channel: chunks of 64 channels are staged with their
// halo as DepthwiseTiles does, two threads a channel, each 4 rows of 8 pixels. Then the tiles of W
// go by, 64 features at a time, in stages of 32 K rows; the rows of the panel that a tile keeps are
// gathered by the addresses that ldmatrix is given. 16-bit elements, sums in float, windows of
// DepthwiseTiles.
#pragma once

#include "fxprune/cuda/depthwise_taps.cuh"
#include "fxprune/cuda/stage_ring.cuh"
#include "fxprune/cuda/tile_gemm_args.cuh"

namespace fxprune::gpu {

struct DsconvArgs {
  DepthwiseArgs depthwise;  // its out is unused
  TileGemmArgs gemm;        // its x is unused; m = out_h * out_w
};

template <class T, int K, int S>
struct Dsconv {
  using Args = DsconvArgs;
  using Planes = DepthwiseTiles<T, K, S, 4>;
  using Tile = typename Planes::Tile;
  static constexpr int kThreads = 128, kBlocks = 2;
  static constexpr int kSide = 8, kChannels = 64;  // of outputs; of a staged chunk
  static constexpr int kFeatures = 64, kRows = 32, kStages = 4;
  static constexpr int kRowBytes = kSide * kSide * 2;
  static constexpr int kWeightBytes = kRows * kFeatures * 2;
  static constexpr int kIndexBytes = kRows * 4;
  static constexpr int kStageBytes = kWeightBytes + kIndexBytes;
  static_assert(Planes::kThreads == kThreads, "the planes are staged by all threads of the block");

  static FXPRUNE_BOTH int plane_bytes() { return Tile::rows(2) * Tile::pitch(1) * 2; }
  static FXPRUNE_BOTH int tap_bytes() { return kChannels * Planes::kTapBytes; }
  // The panel, with a row of zeros behind its last channel; then the staged planes, or the ring of
  // weights.
  static FXPRUNE_BOTH int64_t panel_bytes(int64_t channels) { return (channels + 1) * kRowBytes; }
  static FXPRUNE_BOTH int64_t shared_bytes(int64_t channels) {
    const int64_t planes = tap_bytes() + int64_t{kChannels} * plane_bytes();
    const int64_t ring = int64_t{kStages} * kStageBytes;
    return panel_bytes(channels) + (planes > ring ? planes : ring);
  }

  // Byte of pixels 8*chunk .. 8*chunk+7 of a channel in the panel.
  static FXPRUNE_GPU int panel_at(int channel, int chunk) {
    return channel * kRowBytes + (chunk ^ (channel % 8)) * 16;
  }

  static FXPRUNE_GPU void fill_panel(const DepthwiseArgs& a, int64_t channels, int64_t image,
                                     int top, int left) {
    char* taps = shared_memory() + panel_bytes(channels);
    char* planes = taps + tap_bytes();
    const int first_row = top * S - Planes::kPad, first_column = left * S - Tile::kLeft;
    for (int64_t first = 0; first < channels; first += kChannels) {
      const int count =
          static_cast<int>(channels - first < kChannels ? channels - first : kChannels);
      const int64_t plane = image * channels + first;
      barrier();  // nobody reads the chunk before any more
      if (a.unit == Unit::kVector) {
        Planes::template stage<16>(a, planes, plane, count, first_row, first_column);
      } else if (a.unit == Unit::kWord) {
        Planes::template stage<4>(a, planes, plane, count, first_row, first_column);
      } else {
        Planes::template stage<sizeof(T)>(a, planes, plane, count, first_row, first_column);
      }
      copy_commit();
      for (int i = thread(); i < count * Planes::kTapWords; i += kThreads) {
        const int c = i / Planes::kTapWords;
        Planes::stage_taps(a, taps + c * Planes::kTapBytes, first + c, i % Planes::kTapWords);
      }
      copy_wait<0>();
      barrier();
      const int c = thread() / 2, part = thread() % 2;
      if (c < count) {
        const int64_t channel = first + c;
        float sums[Planes::kRows * kSide];
        const int pitch = Tile::pitch(1) * 2;
        Planes::multiply(planes + c * plane_bytes() + part * Planes::kRows * S * pitch, pitch,
                         taps + c * Planes::kTapBytes, sums);
        activate(a.activation, sums);
        FXPRUNE_UNROLLED
        for (int o = 0; o < Planes::kRows; ++o) {
          store_shared<Quad>(
              shared_memory() + panel_at(static_cast<int>(channel), part * Planes::kRows + o),
              Pack<T>::pack(sums + o * kSide));
        }
      }
    }
    if (thread() < kRowBytes / 16) {
      store_shared<Quad>(shared_memory() + channels * kRowBytes + thread() * 16, Quad{});
    }
    barrier();
  }

  // One stage of 64 features of a tile: their weights, and the K rows that they meet.
  static FXPRUNE_GPU void fill_stage(const TileGemmArgs& a, const char* weights,
                                     const int32_t* index, int64_t rows, int stage, char* to) {
    const int64_t first = int64_t{stage} * kRows;
    const char* from =
        weights + first / kBlockRows * a.layout().block_bytes() + first % kBlockRows * 128;
    FXPRUNE_UNROLLED
    for (int i = 0; i < kWeightBytes / 16 / kThreads; ++i) {
      const int chunk = thread() + i * kThreads;
      copy_async<16>(to + chunk * 16, from + chunk * 16, true);
    }
    if (thread() < kRows) {
      const bool real = first + thread() < rows;
      copy_async<4>(to + kWeightBytes + 4 * thread(), real ? index + first + thread() : index,
                    real);
    }
  }

  // Warps: 2 along features, 2 along pixels, each 32 x 32.
  static FXPRUNE_GPU void multiply(const char* stage, int left_over, int zero_row,
                                   float (&sums)[2][4][4]) {
    const int lane = thread() % 32, warp = thread() / 32;
    const int feature = warp / 2 * 32, chunk = warp % 2 * 4;
    FXPRUNE_UNROLLED
    for (int k = 0; k < kRows; k += 16) {
      const int at = k + lane / 8 % 2 * 8 + lane % 8;
      // Behind the tile's last row a weight of zero meets a zero.
      const int row =
          at < left_over ? load_shared<int32_t>(stage + kWeightBytes + 4 * at) : zero_row;
      uint32_t b[2][4];
      FXPRUNE_UNROLLED
      for (int j = 0; j < 2; ++j) {
        load_matrices_transposed(b[j], shared_memory() + panel_at(row, chunk + 2 * j + lane / 16));
      }
      FXPRUNE_UNROLLED
      for (int i = 0; i < 2; ++i) {
        uint32_t w[4];
        const int weight_row = k + lane / 16 * 8 + lane % 8,
                  column = feature + 16 * i + lane / 8 % 2 * 8;
        load_matrices_transposed(w, stage + panel_offset(weight_row, column));
        FXPRUNE_UNROLLED
        for (int j = 0; j < 4; ++j) {
          multiply_16x8x16<T>(sums[i][j], w, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }

  static FXPRUNE_GPU void run_item(const TileGemmArgs& a, const TileItem& item, char* ring,
                                   int zero_row, const int (&pixel)[2], int width, int height) {
    const char* weights = item_blocks(a, item);
    const int32_t* index = a.index + load_global<int32_t>(a.tile_ptr + item.tile);
    const int stages = static_cast<int>((item.rows + kRows - 1) / kRows);
    float sums[2][4][4];
    FXPRUNE_UNROLLED
    for (int i = 0; i < 32; ++i) sums[i / 16][i / 4 % 4][i % 4] = 0.0f;
    barrier();  // the ring is free
    const auto fill = [&](int i, char* to) { fill_stage(a, weights, index, item.rows, i, to); };
    through_ring<kStages, kStageBytes>(ring, stages, fill, [&](int i, const char* stage) {
      const int64_t left_over = item.rows - int64_t{i} * kRows;
      multiply(stage, static_cast<int>(left_over < kRows ? left_over : kRows), zero_row, sums);
    });

    const int lane = thread() % 32, warp = thread() / 32;
    const int row = pixel[0] + warp % 2 * 4 + lane % 4;
    FXPRUNE_UNROLLED
    for (int i = 0; i < 2; ++i) {
      FXPRUNE_UNROLLED
      for (int half = 0; half < 2; ++half) {
        float v[4][2], pixels[8];
        FXPRUNE_UNROLLED
        for (int j = 0; j < 8; ++j) v[j / 2][j % 2] = sums[i][j / 2][2 * half + j % 2];
        gather_columns(v, pixels);
        const int64_t column = item.first + warp / 2 * 32 + 16 * i + 8 * half + lane / 4;
        const int64_t feature = feature_of(a, item, column);
        if (feature >= 0 && row < height && pixel[1] < width) {
          const int64_t start = ((item.image * a.n + feature) * height + row) * width + pixel[1];
          finish_run<T>(a, feature, start, width - pixel[1], pixels);
        }
      }
    }
  }

  static FXPRUNE_GPU void run(const Args& args) {
    const DepthwiseArgs& d = args.depthwise;
    const TileGemmArgs& a = args.gemm;
    const int across = (d.out_w + kSide - 1) / kSide, down = (d.out_h + kSide - 1) / kSide;
    const int64_t spot = block(0) % (int64_t{across} * down);
    const int pixel[2] = {static_cast<int>(spot / across) * kSide,
                          static_cast<int>(spot % across) * kSide};
    TileItem item;
    item.image = block(0) / (int64_t{across} * down);
    item.token = 0;
    fill_panel(d, a.k, item.image, pixel[0], pixel[1]);
    char* ring = shared_memory() + panel_bytes(a.k);
    for (item.tile = 0; item.tile < a.tiles; ++item.tile) {
      item.rows = load_global<int32_t>(a.tile_ptr + item.tile + 1) -
                  load_global<int32_t>(a.tile_ptr + item.tile);
      for (item.first = 0; item.first < a.layout().panels() * kPanel; item.first += kFeatures) {
        run_item(a, item, ring, static_cast<int>(a.k), pixel, d.out_w, d.out_h);
      }
    }
  }
};

// Calls work(Dsconv) with the kernel for a window that has_tiles() allows.
template <class T, class Work>
auto with_dsconv(const DepthwiseArgs& a, Work work) {
  if (a.stride_h == 1) {
    if (a.kernel_h == 3) return work(Dsconv<T, 3, 1>());
    if (a.kernel_h == 5) return work(Dsconv<T, 5, 1>());
    return work(Dsconv<T, 7, 1>());
  }
  if (a.kernel_h == 3) return work(Dsconv<T, 3, 2>());
  if (a.kernel_h == 5) return work(Dsconv<T, 5, 2>());
  return work(Dsconv<T, 7, 2>());
}

// Bytes of shared memory that a window over so many channels needs.
inline int64_t dsconv_bytes(const DepthwiseArgs& a) {
  return with_dsconv<Half>(a, [&](auto kernel) { return kernel.shared_bytes(a.channels); });
}

// The geometry and the pointers of both parts are set; the rest is chosen here.
template <class T, class Launcher>
void dsconv(Launcher& launcher, DsconvArgs a) {
  const auto aligned = [](const void* p, int64_t width, int64_t bytes) {
    return width * 2 % bytes == 0 && reinterpret_cast<uintptr_t>(p) % bytes == 0;
  };
  DepthwiseArgs& d = a.depthwise;
  a.gemm.vector = aligned(a.gemm.out, d.out_w, 16) && aligned(a.gemm.residual, d.out_w, 16);
  tile_rest<T>(launcher, a.gemm);
  if (a.gemm.tiles == 0) return;
  d.unit = aligned(d.x, d.width, 16)  ? Unit::kVector
           : aligned(d.x, d.width, 4) ? Unit::kWord
                                      : Unit::kElement;
  d.threads_x = 1, d.threads_y = 2;
  d.channels = 1;  // planes of neighbouring channels are staged as those of neighbouring images
  with_dsconv<T>(d, [&](auto kernel) {
    using Kernel = decltype(kernel);
    const int unit = d.unit == Unit::kVector ? 16 : d.unit == Unit::kWord ? 4 : 2;
    d.row_lanes = 1;
    while (d.row_lanes < 32 && d.row_lanes < Kernel::Tile::pitch(1) * 2 / unit) d.row_lanes *= 2;
    const auto sides = [](int size) { return (size + Kernel::kSide - 1) / Kernel::kSide; };
    const int64_t grid[3] = {a.gemm.batch * sides(d.out_h) * sides(d.out_w), 1, 1};
    launcher.template launch<Kernel>(grid, Kernel::shared_bytes(a.gemm.k), a);
  });
}

}  // namespace fxprune::gpu
