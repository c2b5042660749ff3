// Depthwise convolution over kept taps on the GPU.
//
//   y[b, c, oy, ox] = act(sum over kept t = (dy, dx) of w[c, t] * x[b, c, oy*s + dy - p, ox*s + dx
//   - p] + bias[c])
//
// DepthwiseTiles: square windows of 3, 5 or 7 with padding k/2, stride 1 or 2. A block owns one
// channel, of one image or (where planes are small) of several, so that a pruned tap is a branch
// that the whole block takes. The tile of x lies in shared memory with its halo of zeros; a thread
// computes 4 rows of 8 outputs and holds the 4 input rows of the current dy in registers.
// DepthwiseAny: every other geometry, one output at a time straight from memory.
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
  // (batch, channels, tiles_x * tiles_y): sums of the rounded results by tile, or null.
  float* pool;
  bool flipped;  // DepthwiseTiles only: tap t has the weight and the bit of tap K*K-1-t
  // DepthwiseTiles only: threads of a tile along x and y, images per block, tiles per plane, and
  // how the tile is staged.
  int threads_x, threads_y, images, tiles_x, tiles_y, row_lanes;
  Unit unit;
  bool vector_store;  // out_w and the address allow 16-byte stores
};

constexpr int kDepthwiseRows = 4, kDepthwiseColumns = 8;  // outputs of a thread
constexpr int64_t kMostBlocksY = 65535;

// The staged tile of one image: its first column is `left` input columns to the left of the first
// output's, which keeps 16-byte units of the image together.
template <class T, int K, int S>
struct DepthwiseTile {
  static constexpr int kPack = Pack<T>::kCount;
  static constexpr int kLeft = kPack;
  FXPRUNE_BOTH static int rows(int threads_y) { return (threads_y * kDepthwiseRows - 1) * S + K; }
  FXPRUNE_BOTH static int pitch(int threads_x) {
    return 2 * kPack + threads_x * kDepthwiseColumns * S;
  }
  // In front of the planes: the weights, and a float per thread for adding up.
  static constexpr int kWeights = 256, kBefore = kWeights + 512;
  FXPRUNE_BOTH static int64_t bytes(int threads_x, int threads_y, int images) {
    return kBefore + int64_t{images} * rows(threads_y) * pitch(threads_x) * int64_t{sizeof(T)};
  }
};

template <class T, int K, int S>
struct DepthwiseTiles {
  using Args = DepthwiseArgs;
  using Tile = DepthwiseTile<T, K, S>;
  // A block less where the window of a thread alone takes over 80 registers of 4 bytes.
  static constexpr int kThreads = 128, kBlocks = S == 2 && K == 7 ? 2 : 3;
  static constexpr int kPack = Tile::kPack, kPad = K / 2;
  static constexpr int kSkip = Tile::kLeft - kPad;  // staged columns before a thread's window
  static constexpr int kWindow = (kDepthwiseColumns - 1) * S + K;
  static constexpr int kLoads = (kSkip + kWindow + kPack - 1) / kPack;

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

  static FXPRUNE_GPU void run(const Args& a) {
    const int64_t channel = block(1) + block(2) * kMostBlocksY;
    if (channel >= a.channels) return;
    const int tile_x = static_cast<int>(block(0) % a.tiles_x);
    const int64_t rest = block(0) / a.tiles_x;
    const int tile_y = static_cast<int>(rest % a.tiles_y);
    const int64_t first_image = rest / a.tiles_y * a.images;
    const int64_t left_over = a.batch - first_image;
    const int64_t images = left_over < a.images ? left_over : a.images;
    const int top = tile_y * a.threads_y * kDepthwiseRows,
              left = tile_x * a.threads_x * kDepthwiseColumns;

    char* weights = shared_memory();
    char* tile = shared_memory() + Tile::kBefore;
    if (thread() < K * K) {
      const T* weight = static_cast<const T*>(a.weight) + channel * K * K;
      const int slot = a.flipped ? K * K - 1 - thread() : thread();
      store_shared<float>(weights + 4 * slot, to_float(load_global<T>(weight + thread())));
    }
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
    uint64_t mask = load_global<uint64_t>(a.taps + channel);
    if (a.flipped) mask = reverse_bits(mask) >> (64 - K * K);
    copy_wait<0>();
    barrier();

    const int per_image = a.threads_x * a.threads_y;
    const int image = thread() / per_image, within = thread() % per_image;
    const int ty = within / a.threads_x, tx = within % a.threads_x;
    const int row = top + ty * kDepthwiseRows, column = left + tx * kDepthwiseColumns;
    float pooled = 0.0f;
    if (image < images && row < a.out_h && column < a.out_w) {
      pooled = compute(a, tile, weights, mask, plane + image * a.channels, channel, image, ty, tx,
                       row, column);
    }
    if (a.pool == nullptr) return;
    pooled = add_up(pooled, within, per_image);
    if (image < images && within == 0) {
      const int64_t at = (plane + image * a.channels) * a.tiles_y + tile_y;
      store_global<float>(a.pool + at * a.tiles_x + tile_x, pooled);
    }
  }

  // Computes and stores the outputs of a thread; returns the sum of them as stored.
  static FXPRUNE_GPU float compute(const Args& a, const char* tile, const char* weights,
                                   uint64_t mask, int64_t out_plane, int64_t channel, int image,
                                   int ty, int tx, int row, int column) {
    const int pitch = Tile::pitch(a.threads_x) * static_cast<int>(sizeof(T));
    const char* window =
        tile + (int64_t{image} * Tile::rows(a.threads_y) + ty * kDepthwiseRows * S) * pitch +
        tx * kDepthwiseColumns * S * static_cast<int>(sizeof(T));
    float sums[kDepthwiseRows][kDepthwiseColumns];
    const float start = a.bias == nullptr
                            ? 0.0f
                            : to_float(load_global<T>(static_cast<const T*>(a.bias) + channel));
    FXPRUNE_UNROLLED
    for (int o = 0; o < kDepthwiseRows; ++o) {
      FXPRUNE_UNROLLED
      for (int j = 0; j < kDepthwiseColumns; ++j) sums[o][j] = start;
    }
    multiply(window, pitch, weights, static_cast<uint32_t>(mask), static_cast<uint32_t>(mask >> 32),
             sums);
    float pooled = 0.0f;
    FXPRUNE_UNROLLED
    for (int o = 0; o < kDepthwiseRows; ++o) {
      activate(a.activation, sums[o]);
      if (row + o < a.out_h) {
        const int64_t at = (out_plane * a.out_h + row + o) * a.out_w + column;
        store(a, static_cast<T*>(a.out) + at, a.out_w - column, sums[o]);
        if (a.pool != nullptr) {
          FXPRUNE_UNROLLED
          for (int j = 0; j < kDepthwiseColumns; ++j) {
            if (column + j < a.out_w) pooled += to_float(from_float<T>(sums[o][j]));
          }
        }
      }
    }
    return pooled;
  }

  // Sums over the `count` neighbouring threads of which this one is number `within`, in a fixed
  // order; number 0 gets the result.
  static FXPRUNE_GPU float add_up(float value, int within, int count) {
    char* own = shared_memory() + Tile::kWeights + 4 * thread();
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

  static FXPRUNE_GPU void multiply(const char* window, int pitch, const char* weights, uint32_t low,
                                   uint32_t high,
                                   float (&sums)[kDepthwiseRows][kDepthwiseColumns]) {
    float x[kDepthwiseRows][kWindow];
    FXPRUNE_UNROLLED
    for (int dy = 0; dy < K; ++dy) {
      FXPRUNE_UNROLLED
      for (int o = 0; o < kDepthwiseRows; ++o) {
        // With stride 1 the next dy needs the rows of this one, moved by one.
        if (S == 1 && dy > 0 && o < kDepthwiseRows - 1) {
          FXPRUNE_UNROLLED
          for (int j = 0; j < kWindow; ++j) x[o][j] = x[o + 1][j];
        } else {
          load_row(window + (o * S + dy) * pitch, x[o]);
        }
      }
      FXPRUNE_UNROLLED
      for (int dx = 0; dx < K; ++dx) {
        const int t = dy * K + dx;
        if ((t < 32 ? low >> t : high >> (t - 32)) & 1) {
          const float w = load_shared<float>(weights + 4 * t);
          FXPRUNE_UNROLLED
          for (int o = 0; o < kDepthwiseRows; ++o) {
            FXPRUNE_UNROLLED
            for (int j = 0; j < kDepthwiseColumns; ++j) sums[o][j] += w * x[o][j * S + dx];
          }
        }
      }
    }
  }

  static FXPRUNE_GPU void store(const Args& a, T* out, int count,
                                const float (&v)[kDepthwiseColumns]) {
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

template <class T>
struct DepthwiseAny {
  using Args = DepthwiseArgs;
  static constexpr int kThreads = 256, kBlocks = 2;

  static FXPRUNE_GPU void run(const Args& a) {
    const int64_t total = a.batch * a.channels * a.out_h * a.out_w;
    for (int64_t i = block(0) * kThreads + thread(); i < total; i += blocks(0) * kThreads) {
      const int ox = static_cast<int>(i % a.out_w);
      const int64_t rest = i / a.out_w;
      const int oy = static_cast<int>(rest % a.out_h);
      const int64_t plane = rest / a.out_h, channel = plane % a.channels;
      float sum[1] = {a.bias == nullptr
                          ? 0.0f
                          : to_float(load_global<T>(static_cast<const T*>(a.bias) + channel))};
      const T* x = static_cast<const T*>(a.x) + plane * a.height * a.width;
      const int window = a.kernel_h * a.kernel_w;
      for (int t = 0; t < window; ++t) {
        if (!(load_global<uint64_t>(a.taps + channel * a.tap_words + t / 64) >> (t % 64) & 1)) {
          continue;
        }
        const int64_t row = int64_t{oy} * a.stride_h - a.pad_h +
                            int64_t{t / a.kernel_w} * a.dilation_h,
                      column = int64_t{ox} * a.stride_w - a.pad_w +
                               int64_t{t % a.kernel_w} * a.dilation_w;
        if (row < 0 || row >= a.height || column < 0 || column >= a.width) continue;
        const T w = load_global<T>(static_cast<const T*>(a.weight) + channel * window + t);
        sum[0] += to_float(w) * to_float(load_global<T>(x + row * a.width + column));
      }
      activate(a.activation, sum);
      store_global<T>(static_cast<T*>(a.out) + i, from_float<T>(sum[0]));
    }
  }
};

// True for the windows of DepthwiseTiles.
FXPRUNE_BOTH bool has_tiles(const DepthwiseArgs& a) {
  const int k = a.kernel_h, s = a.stride_h;
  return k == a.kernel_w && s == a.stride_w && a.pad_h == k / 2 && a.pad_w == k / 2 &&
         a.dilation_h == 1 && a.dilation_w == 1 && (k == 3 || k == 5 || k == 7) &&
         (s == 1 || s == 2);
}

// Cuts planes in tiles, for blocks of so many threads.
inline void set_tiles(DepthwiseArgs* a, int threads) {
  const auto up = [](int64_t count, int64_t step) { return (count + step - 1) / step; };
  const auto least = [](int64_t x, int64_t y) { return static_cast<int>(x < y ? x : y); };
  a->threads_x = least(up(a->out_w, kDepthwiseColumns), 16);
  a->threads_y = least(up(a->out_h, kDepthwiseRows), threads / a->threads_x);
  a->images = least(a->batch, threads / (a->threads_x * a->threads_y));
  a->tiles_x = static_cast<int>(up(a->out_w, a->threads_x * kDepthwiseColumns));
  a->tiles_y = static_cast<int>(up(a->out_h, a->threads_y * kDepthwiseRows));
}

// Runs the operator by `launcher.launch<Kernel>(grid, shared bytes, args)`. The geometry and the
// pointers of `a` are set; the rest is chosen here.
template <class T, class Launcher>
void depthwise_taps(Launcher& launcher, DepthwiseArgs a) {
  const auto tiles = [&](auto kernel) {
    using Kernel = decltype(kernel);
    set_tiles(&a, Kernel::kThreads);
    const auto aligned = [](const void* p, int64_t width, int64_t bytes) {
      return width * int64_t{sizeof(T)} % bytes == 0 && reinterpret_cast<uintptr_t>(p) % bytes == 0;
    };
    a.unit = aligned(a.x, a.width, 16)  ? Unit::kVector
             : aligned(a.x, a.width, 4) ? Unit::kWord
                                        : Unit::kElement;
    a.vector_store = aligned(a.out, a.out_w, 16);
    const int unit = a.unit == Unit::kVector ? 16 : a.unit == Unit::kWord ? 4 : sizeof(T);
    const int64_t units = Kernel::Tile::pitch(a.threads_x) * int64_t{sizeof(T)} / unit;
    a.row_lanes = 1;
    while (a.row_lanes < 32 && a.row_lanes < units) a.row_lanes *= 2;
    const int64_t layers = (a.channels + kMostBlocksY - 1) / kMostBlocksY;
    const int64_t grid[3] = {(a.batch + a.images - 1) / a.images * a.tiles_x * a.tiles_y,
                             layers > 1 ? kMostBlocksY : a.channels, layers};
    launcher.template launch<Kernel>(grid, Kernel::Tile::bytes(a.threads_x, a.threads_y, a.images),
                                     a);
  };
  const int k = a.kernel_h;
  if (has_tiles(a)) {
    if (a.stride_h == 1) {
      if (k == 3) return tiles(DepthwiseTiles<T, 3, 1>());
      if (k == 5) return tiles(DepthwiseTiles<T, 5, 1>());
      return tiles(DepthwiseTiles<T, 7, 1>());
    }
    if (k == 3) return tiles(DepthwiseTiles<T, 3, 2>());
    if (k == 5) return tiles(DepthwiseTiles<T, 5, 2>());
    return tiles(DepthwiseTiles<T, 7, 2>());
  }
  const int64_t total = a.batch * a.channels * a.out_h * a.out_w;
  const int64_t wanted = (total + DepthwiseAny<T>::kThreads - 1) / DepthwiseAny<T>::kThreads;
  const int64_t grid[3] = {wanted < (int64_t{1} << 20) ? wanted : int64_t{1} << 20, 1, 1};
  launcher.template launch<DepthwiseAny<T>>(grid, 0, a);
}

}  // namespace fxprune::gpu
