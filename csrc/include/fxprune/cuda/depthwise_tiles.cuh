// Depthwise convolution over kept taps on the GPU: square windows of 3, 5 or 7 with padding k/2,
// stride 1 or 2. A block owns one channel, of one image or (where planes are small) of several, so
// that a pruned tap is a branch that the whole block takes. The tile of x lies in shared memory
// with its halo of zeros; a thread computes 4 or 8 rows of 8 outputs and holds the input rows of
// the current dy in registers. Eight rows share more of what is loaded and tested per tap, but
// leave half as many threads (tile_rows() in depthwise_taps.cuh).
#pragma once

#include "fxprune/activation.h"
#include "fxprune/cuda/activation.cuh"
#include "fxprune/cuda/ptx.cuh"

namespace fxprune::gpu {

// How rows of x travel to shared memory: by the largest unit that no row of the image splits.
enum class Unit : int { kVector, kWord, kElement };  // 16 bytes, 4 bytes, one element

struct DepthwiseArgs {
  const void* x;         // (batch, channels, height, width)
  const void* weight;    // (channels, kernel_h * kernel_w)
  const uint64_t* taps;  // (channels, tap_words): bit t%64 of word t/64 keeps tap t
  const void* bias;      // (channels) or null
  void* out;             // (batch, channels, out_h, out_w)
  int64_t batch, channels;
  int height, width, out_h, out_w, tap_words;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Activation activation;
  // (batch, channels, tiles_x * tiles_y): sums of the rounded results by tile.
  float* pool;
  bool flipped;  // DepthwiseTiles only: tap t has the weight and the bit of tap K*K-1-t
  // DepthwiseTiles only: threads of a tile along x and y, images per block, tiles per plane, and
  // how the tile is staged; bytes of a staged row and image; 2^16 over the threads of an image and
  // of a row, rounded up.
  int row_bytes, image_bytes;
  uint32_t image_inverse, row_inverse;
  int threads_x, threads_y, images, tiles_x, tiles_y, row_lanes;
  Unit unit;
  bool vector_store;  // out_w and the address allow 16-byte stores
};

constexpr int kDepthwiseColumns = 8;  // outputs of a thread in a row
constexpr int64_t kMostBlocksY = 65535;

// The staged tile of one image: its first column is `left` input columns to the left of the first
// output's, which keeps 16-byte units of the image together.
template <class T, int K, int S, int Rows>
struct DepthwiseTile {
  static constexpr int kPack = Pack<T>::kCount;
  static constexpr int kLeft = kPack;
  FXPRUNE_BOTH static int rows(int threads_y) { return (threads_y * Rows - 1) * S + K; }
  FXPRUNE_BOTH static int pitch(int threads_x) {
    return 2 * kPack + threads_x * kDepthwiseColumns * S;
  }
  // In front of the planes: the taps, and a float per thread for adding up.
  static constexpr int kTaps = 256, kBefore = kTaps + 512;
  FXPRUNE_BOTH static int64_t bytes(int threads_x, int threads_y, int images) {
    return kBefore + int64_t{images} * rows(threads_y) * pitch(threads_x) * int64_t{sizeof(T)};
  }
};

// Pool: also adds up its results into `pool`, which takes registers.
template <class T, int K, int S, int Rows, bool Pool = false>
struct DepthwiseTiles {
  using Args = DepthwiseArgs;
  using Tile = DepthwiseTile<T, K, S, Rows>;
  // A block less where the window of a thread alone takes over 80 registers.
  static constexpr int kRows = Rows, kThreads = 128,
                       kBlocks =
                           Rows == 8 || (S == 2 && (K == 7 || Pool || sizeof(T) == 4)) ? 2 : 3;
  static constexpr int kPack = Tile::kPack, kPad = K / 2;
  static constexpr int kSkip = Tile::kLeft - kPad;  // staged columns before a thread's window
  static constexpr int kWindow = (kDepthwiseColumns - 1) * S + K;
  static constexpr int kLoads = (kSkip + kWindow + kPack - 1) / kPack;

  // The taps of a channel in shared memory: rows of K weights in float, whose last word has bit
  // dx + 1 for a kept dx (a test of bit 0 takes two instructions, of the others one); behind them
  // four times the bias. 3x3 has 16 bytes more, so that channels side by side begin in other banks.
  static constexpr int kTapPitch = K == 3 ? 4 : 8, kBiasAt = K * kTapPitch * 4;
  static constexpr int kTapBytes = kBiasAt + (K == 3 ? 32 : 16), kTapWords = K * kTapPitch + 4;
  static_assert(kTapBytes <= Tile::kTaps, "room for the taps of a channel");

  // One row of a thread's window.
  static FXPRUNE_GPU void load_row(const char* at, float (&row)[kWindow]) {
    FXPRUNE_UNROLLED
    for (int i = 0; i < kLoads; ++i) {
      float part[kPack];
      Pack<T>::unpack(load_shared<Quad>(at + 16 * i), part);
      FXPRUNE_UNROLLED
      for (int j = 0; j < kPack; ++j) {
        const int column = i * kPack + j - kSkip;
        if (column >= 0 && column < kWindow) {
          row[column] = part[j];
          keep(row[column]);
        }
      }
    }
  }

  template <int Bytes>
  static FXPRUNE_GPU void stage_unit(char* to, const T* from, bool valid) {
    if constexpr (Bytes >= 4) {
      copy_async<Bytes>(to, from, valid);
    } else {
      store_shared<T>(to, valid ? load_global<T>(from) : T{});
    }
  }

  // Copies the tile row by row; row_lanes threads share a row. Outside the image there are zeros.
  template <int Bytes>
  static FXPRUNE_GPU void stage(const Args& a, char* tile, int64_t plane, int64_t images, int top,
                                int left) {
    constexpr int kUnit = Bytes / static_cast<int>(sizeof(T));
    const int rows = Tile::rows(a.threads_y), pitch = Tile::pitch(a.threads_x);
    const int64_t image_stride = a.channels * a.height * a.width;
    const T* x = static_cast<const T*>(a.x) + plane * a.height * a.width;
    const int total = static_cast<int>(images) * rows;
    for (int i = thread() / a.row_lanes; i < total; i += kThreads / a.row_lanes) {
      const int image = i / rows, row = top + i % rows;
      const T* from = x + image * image_stride + int64_t{row} * a.width;
      const bool inside = row >= 0 && row < a.height;
      char* to = tile + int64_t{i} * pitch * static_cast<int>(sizeof(T));
      for (int c = thread() % a.row_lanes * kUnit; c < pitch; c += a.row_lanes * kUnit) {
        const int column = left + c;
        const bool valid = inside && column >= 0 && column < a.width;
        stage_unit<Bytes>(to + c * static_cast<int>(sizeof(T)), valid ? from + column : x, valid);
      }
    }
  }

  // Writes word i of the kTapWords words of a channel's taps.
  static FXPRUNE_GPU void stage_taps(const Args& a, char* to, int64_t channel, int i) {
    const int row = i / kTapPitch, dx = i % kTapPitch;
    float word = 0.0f;
    if (row == K) {
      const T* bias = static_cast<const T*>(a.bias);
      if (bias != nullptr) word = to_float(load_global<T>(bias + channel));
    } else if (dx < K) {
      const int tap = row * K + dx;
      const T* weight = static_cast<const T*>(a.weight) + channel * K * K;
      word = to_float(load_global<T>(weight + (a.flipped ? K * K - 1 - tap : tap)));
    } else if (dx == kTapPitch - 1) {
      uint64_t mask = load_global<uint64_t>(a.taps + channel);
      if (a.flipped) mask = reverse_bits(mask) >> (64 - K * K);
      const uint32_t kept = static_cast<uint32_t>(mask >> (row * K)) & ((1u << K) - 1);
      word = float_of_bits(kept << 1);
    }
    store_shared<float>(to + 4 * i, word);
  }

  static FXPRUNE_GPU void run(const Args& a) {
    const int64_t channel = block(1) + block(2) * kMostBlocksY;
    if (channel >= a.channels) return;
    const int tile_x = static_cast<int>(block(0) % a.tiles_x);
    const int64_t rest = block(0) / a.tiles_x;
    const int tile_y = static_cast<int>(rest % a.tiles_y);
    const int64_t first_image = rest / a.tiles_y * a.images;
    const int64_t left_over = a.batch - first_image;
    const int images = left_over < a.images ? static_cast<int>(left_over) : a.images;
    const int top = tile_y * a.threads_y * Rows, left = tile_x * a.threads_x * kDepthwiseColumns;

    char* taps = shared_memory();
    char* tile = shared_memory() + Tile::kBefore;
    if (thread() < kTapWords) stage_taps(a, taps, channel, thread());
    const int64_t plane = first_image * a.channels + channel;
    const int first_row = top * S - kPad, first_column = left * S - Tile::kLeft;
    if (a.unit == Unit::kVector) {
      stage<16>(a, tile, plane, images, first_row, first_column);
    } else if (a.unit == Unit::kWord) {
      stage<4>(a, tile, plane, images, first_row, first_column);
    } else {
      stage<sizeof(T)>(a, tile, plane, images, first_row, first_column);
    }
    copy_commit();
    copy_wait<0>();
    barrier();

    const int per_image = a.threads_x * a.threads_y;
    const auto over = [](int count, uint32_t inverse) {  // exact for the threads of a block
      return static_cast<int>(static_cast<uint32_t>(count) * inverse >> 16);
    };
    const int image = over(thread(), a.image_inverse), within = thread() - image * per_image;
    const int ty = over(within, a.row_inverse), tx = within - ty * a.threads_x;
    const int row = top + ty * Rows, column = left + tx * kDepthwiseColumns;
    float pooled = 0.0f;
    if (image < images && row < a.out_h && column < a.out_w) {
      pooled = compute(a, tile, taps, plane + image * a.channels, image, ty, tx, row, column);
    }
    if constexpr (Pool) {
      pooled = add_up(pooled, within, per_image);
      if (image < images && within == 0) {
        const int64_t at = (plane + image * a.channels) * a.tiles_y + tile_y;
        store_global<float>(a.pool + at * a.tiles_x + tile_x, pooled);
      }
    }
  }

  // Computes and stores the outputs of a thread; returns, with Pool, the sum of them as stored.
  static FXPRUNE_GPU float compute(const Args& a, const char* tile, const char* taps,
                                   int64_t out_plane, int image, int ty, int tx, int row,
                                   int column) {
    const char* window = tile + image * a.image_bytes + ty * Rows * S * a.row_bytes +
                         tx * kDepthwiseColumns * S * static_cast<int>(sizeof(T));
    float sums[Rows * kDepthwiseColumns];
    multiply(window, a.row_bytes, taps, sums);
    activate(a.activation, sums);
    float pooled = 0.0f;
    FXPRUNE_UNROLLED
    for (int o = 0; o < Rows; ++o) {
      if (row + o < a.out_h) {
        const int64_t at = (out_plane * a.out_h + row + o) * a.out_w + column;
        const float* of_row = sums + o * kDepthwiseColumns;
        store(a, static_cast<T*>(a.out) + at, a.out_w - column, of_row);
        if constexpr (Pool) {
          FXPRUNE_UNROLLED
          for (int j = 0; j < kDepthwiseColumns; ++j) {
            if (column + j < a.out_w) pooled += to_float(from_float<T>(of_row[j]));
          }
        }
      }
    }
    return pooled;
  }

  // Sums over the `count` neighbouring threads of which this one is number `within`, in a fixed
  // order; number 0 gets the result.
  static FXPRUNE_GPU float add_up(float value, int within, int count) {
    char* own = shared_memory() + Tile::kTaps + 4 * thread();
    store_shared<float>(own, value);
    int half = 1;
    while (2 * half < count) half *= 2;
    for (; count > 1 && half > 0; half /= 2) {
      barrier();
      if (within < half && within + half < count) {
        value += load_shared<float>(own + 4 * half);
        store_shared<float>(own, value);
      }
      count = half;
    }
    return value;
  }

  // Loads the weights of a row of taps; returns the bits of the kept ones.
  static FXPRUNE_GPU uint32_t load_taps(const char* row, float (&w)[kTapPitch]) {
    uint32_t last = 0;
    FXPRUNE_UNROLLED
    for (int i = 0; i < kTapPitch; i += 4) {
      const Quad quad = load_shared<Quad>(row + 4 * i);
      FXPRUNE_UNROLLED
      for (int j = 0; j < 4; ++j) {
        w[i + j] = float_of_bits(quad.word[j]);
        if (i + j < K) keep(w[i + j]);  // loaded here, not tap by tap
      }
      last = quad.word[3];
    }
    return last;
  }

  // sums = bias + w * x for the first tap, or bias without it: a conditional product on top of sums
  // that begin as the bias would set them twice.
  static FXPRUNE_GPU void start(bool first_kept, float w, const float (&x)[Rows][kWindow],
                                const char* bias, float (&sums)[Rows * kDepthwiseColumns]) {
    constexpr int kCount = Rows * kDepthwiseColumns;
    if (first_kept) {
      const float begin = load_shared<float>(bias);
      FXPRUNE_UNROLLED
      for (int i = 0; i < kCount; ++i) sums[i] = begin + w * x[i / 8][i % 8 * S];
    } else {
      FXPRUNE_UNROLLED
      for (int i = 0; i < kCount; i += 4) {
        const Quad quad = load_shared_anew(bias);  // four sums by an instruction
        FXPRUNE_UNROLLED
        for (int j = 0; j < 4; ++j) sums[i + j] = float_of_bits(quad.word[j]);
      }
    }
  }

  static FXPRUNE_GPU void multiply(const char* window, int pitch, const char* taps,
                                   float (&sums)[Rows * kDepthwiseColumns]) {
    float x[Rows][kWindow];
    FXPRUNE_UNROLLED
    for (int dy = 0; dy < K; ++dy) {
      FXPRUNE_UNROLLED
      for (int o = 0; o < Rows; ++o) {
        // With stride 1 the next dy needs the rows of this one, moved by one.
        if (S == 1 && dy > 0 && o < Rows - 1) {
          FXPRUNE_UNROLLED
          for (int j = 0; j < kWindow; ++j) x[o][j] = x[o + 1][j];
        } else {
          load_row(window + (o * S + dy) * pitch, x[o]);
        }
      }
      float w[kTapPitch];
      const uint32_t kept = load_taps(taps + 4 * dy * kTapPitch, w);
      if (dy == 0) start((kept & 2u) != 0, w[0], x, taps + kBiasAt, sums);
      FXPRUNE_UNROLLED
      for (int dx = dy == 0 ? 1 : 0; dx < K; ++dx) {
        if (kept & 2u << dx) {
          FXPRUNE_UNROLLED
          for (int i = 0; i < Rows * kDepthwiseColumns; ++i) {
            sums[i] += w[dx] * x[i / 8][i % 8 * S + dx];
          }
        }
      }
    }
  }

  static FXPRUNE_GPU void store(const Args& a, T* out, int count, const float* v) {
    if (a.vector_store) {
      FXPRUNE_UNROLLED
      for (int j = 0; j < kDepthwiseColumns; j += kPack) {
        if (j < count) store_global<Quad>(out + j, Pack<T>::pack(v + j));
      }
    } else {
      FXPRUNE_UNROLLED
      for (int j = 0; j < kDepthwiseColumns; ++j) {
        if (j < count) store_global<T>(out + j, from_float<T>(v[j]));
      }
    }
  }
};

}  // namespace fxprune::gpu
