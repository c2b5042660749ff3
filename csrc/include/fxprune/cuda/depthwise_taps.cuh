// Depthwise convolution over kept taps on the GPU.
//
//   y[b, c, oy, ox] = act(sum over kept t = (dy, dx) of w[c, t] * x[b, c, oy*s + dy - p, ox*s + dx
//   - p] + bias[c])
//
// DepthwiseTiles has the common windows. DepthwiseAny: every other geometry, one output at a time
// straight from memory.
#pragma once

#include "fxprune/cuda/depthwise_tiles.cuh"

namespace fxprune::gpu {

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

// Rows of outputs that a thread of DepthwiseTiles computes: 8 where that rounds planes no further
// up than 4 and threads enough for whole blocks are left. 3x3 is bound by memory: more blocks at a
// time help it more.
FXPRUNE_BOTH int tile_rows(const DepthwiseArgs& a, bool pool) {
  const int64_t threads = a.batch * ((a.out_h + 7) / 8) * ((a.out_w + 7) / 8);
  const bool tall = a.kernel_h > 3 && a.stride_h == 1 && (a.out_h + 3) / 4 % 2 == 0;
  return tall && !pool && threads >= 128 ? 8 : 4;
}

// Cuts planes in tiles, for blocks of so many threads with so many rows of outputs each.
inline void set_tiles(DepthwiseArgs* a, int threads, int rows) {
  const auto up = [](int64_t count, int64_t step) { return (count + step - 1) / step; };
  const auto least = [](int64_t x, int64_t y) { return static_cast<int>(x < y ? x : y); };
  a->threads_x = least(up(a->out_w, kDepthwiseColumns), 16);
  a->threads_y = least(up(a->out_h, rows), threads / a->threads_x);
  a->images = least(a->batch, threads / (a->threads_x * a->threads_y));
  a->tiles_x = static_cast<int>(up(a->out_w, a->threads_x * kDepthwiseColumns));
  a->tiles_y = static_cast<int>(up(a->out_h, a->threads_y * rows));
  a->image_inverse = static_cast<uint32_t>(up(1 << 16, a->threads_x * a->threads_y));
  a->row_inverse = static_cast<uint32_t>(up(1 << 16, a->threads_x));
}

// Runs the operator by `launcher.launch<Kernel>(grid, shared bytes, args)`. The geometry and the
// pointers of `a` are set; the rest is chosen here.
template <class T, bool Pool = false, class Launcher>
void depthwise_taps(Launcher& launcher, DepthwiseArgs a) {
  const auto tiles = [&](auto kernel) {
    using Kernel = decltype(kernel);
    set_tiles(&a, Kernel::kThreads, Kernel::kRows);
    a.row_bytes = Kernel::Tile::pitch(a.threads_x) * int{sizeof(T)};
    a.image_bytes = Kernel::Tile::rows(a.threads_y) * a.row_bytes;
    const int64_t room = (kLeastSharedBytes - Kernel::Tile::kBefore) / a.image_bytes;
    if (a.images > room) a.images = static_cast<int>(room);
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
    if constexpr (!Pool) {
      if (tile_rows(a, Pool) == 8 && k == 5) return tiles(DepthwiseTiles<T, 5, 1, 8>());
      if (tile_rows(a, Pool) == 8) return tiles(DepthwiseTiles<T, 7, 1, 8>());
    }
    if (a.stride_h == 1) {
      if (k == 3) return tiles(DepthwiseTiles<T, 3, 1, 4, Pool>());
      if (k == 5) return tiles(DepthwiseTiles<T, 5, 1, 4, Pool>());
      return tiles(DepthwiseTiles<T, 7, 1, 4, Pool>());
    }
    if (k == 3) return tiles(DepthwiseTiles<T, 3, 2, 4, Pool>());
    if (k == 5) return tiles(DepthwiseTiles<T, 5, 2, 4, Pool>());
    return tiles(DepthwiseTiles<T, 7, 2, 4, Pool>());
  }
  const int64_t total = a.batch * a.channels * a.out_h * a.out_w;
  const int64_t wanted = (total + DepthwiseAny<T>::kThreads - 1) / DepthwiseAny<T>::kThreads;
  const int64_t grid[3] = {wanted < (int64_t{1} << 20) ? wanted : int64_t{1} << 20, 1, 1};
  launcher.template launch<DepthwiseAny<T>>(grid, 0, a);
}

}  // namespace fxprune::gpu
