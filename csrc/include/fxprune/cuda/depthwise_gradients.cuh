// The gradients of a depthwise convolution over kept taps.
//
//   dx[b, c, y, x] = sum over kept t = (dy, dx) of w[c, t] * g[b, c, oy, ox],  oy*s + dy*d - p = y,
//   ... dw[c, t]       = sum over b, oy, ox of g[b, c, oy, ox] * x[b, c, oy*s + dy*d - p, ...], 0
//   if t is not kept
//
// With stride 1 and padding k/2 the input's gradient is a convolution of g with the taps in
// reverse, and runs as one. All sums are in float and in a fixed order.
#pragma once

#include "fxprune/cuda/block_sum.cuh"
#include "fxprune/cuda/depthwise_taps.cuh"

namespace fxprune::gpu {

// dx one element at a time. In `a`, x is g (batch, channels, out_h, out_w) and out is dx.
template <class T>
struct DepthwiseInputGradient {
  using Args = DepthwiseArgs;
  static constexpr int kThreads = 256, kBlocks = 2;

  static FXPRUNE_GPU void run(const Args& a) {
    const int64_t total = a.batch * a.channels * a.height * a.width;
    const int window = a.kernel_h * a.kernel_w;
    for (int64_t i = block(0) * kThreads + thread(); i < total; i += blocks(0) * kThreads) {
      const int column = static_cast<int>(i % a.width);
      const int64_t rest = i / a.width;
      const int row = static_cast<int>(rest % a.height);
      const int64_t plane = rest / a.height, channel = plane % a.channels;
      const T* g = static_cast<const T*>(a.x) + plane * a.out_h * a.out_w;
      float sum = 0.0f;
      for (int t = 0; t < window; ++t) {
        if (!(load_global<uint64_t>(a.taps + channel * a.tap_words + t / 64) >> (t % 64) & 1)) {
          continue;
        }
        const int64_t down = int64_t{row} + a.pad_h - int64_t{t / a.kernel_w} * a.dilation_h,
                      right = int64_t{column} + a.pad_w - int64_t{t % a.kernel_w} * a.dilation_w;
        if (down < 0 || right < 0 || down % a.stride_h != 0 || right % a.stride_w != 0) continue;
        const int64_t oy = down / a.stride_h, ox = right / a.stride_w;
        if (oy >= a.out_h || ox >= a.out_w) continue;
        const T w = load_global<T>(static_cast<const T*>(a.weight) + channel * window + t);
        sum += to_float(w) * to_float(load_global<T>(g + oy * a.out_w + ox));
      }
      store_global<T>(static_cast<T*>(a.out) + i, from_float<T>(sum));
    }
  }
};

// dw, a block per channel and tap; one that is not kept is a zero. In `a`, x is x, weight is g and
// out is dw.
template <class T>
struct DepthwiseWeightGradient {
  using Args = DepthwiseArgs;
  static constexpr int kThreads = 256, kBlocks = 4, kSharedBytes = kThreads * 4;

  static FXPRUNE_GPU void run(const Args& a) {
    const int window = a.kernel_h * a.kernel_w;
    for (int64_t i = block(0); i < a.channels * window; i += blocks(0)) {
      const int64_t channel = i / window;
      const int t = static_cast<int>(i % window);
      float sum = 0.0f;
      if (load_global<uint64_t>(a.taps + channel * a.tap_words + t / 64) >> (t % 64) & 1) {
        sum = add_positions(a, channel, t);
      }
      sum = add_threads<kThreads>(sum);
      if (thread() == 0) store_global<T>(static_cast<T*>(a.out) + i, from_float<T>(sum));
    }
  }

  static FXPRUNE_GPU float add_positions(const Args& a, int64_t channel, int t) {
    const int64_t down = int64_t{t / a.kernel_w} * a.dilation_h - a.pad_h,
                  right = int64_t{t % a.kernel_w} * a.dilation_w - a.pad_w;
    const int size = a.out_h * a.out_w;
    float sum = 0.0f;
    for (int64_t image = 0; image < a.batch; ++image) {
      const int64_t plane = image * a.channels + channel;
      const T* g = static_cast<const T*>(a.weight) + plane * size;
      const T* x = static_cast<const T*>(a.x) + plane * a.height * a.width;
      for (int at = thread(); at < size; at += kThreads) {
        const int64_t row = int64_t{at / a.out_w} * a.stride_h + down,
                      column = int64_t{at % a.out_w} * a.stride_w + right;
        if (row < 0 || row >= a.height || column < 0 || column >= a.width) continue;
        sum +=
            to_float(load_global<T>(g + at)) * to_float(load_global<T>(x + row * a.width + column));
      }
    }
    return sum;
  }
};

// True where the input's gradient is depthwise_taps() of g with `flipped` set.
inline bool is_reversed_convolution(const DepthwiseArgs& a) {
  return has_tiles(a) && a.stride_h == 1;
}

// Any geometry. That of `a` is the forward convolution's; its pointers are as the kernels above
// say.
template <class T, class Launcher>
void depthwise_grad_input(Launcher& launcher, const DepthwiseArgs& a) {
  using Kernel = DepthwiseInputGradient<T>;
  const int64_t total = a.batch * a.channels * a.height * a.width;
  const int64_t wanted = (total + Kernel::kThreads - 1) / Kernel::kThreads;
  const int64_t grid[3] = {wanted < (int64_t{1} << 20) ? wanted : int64_t{1} << 20, 1, 1};
  launcher.template launch<Kernel>(grid, 0, a);
}

template <class T, class Launcher>
void depthwise_grad_weight(Launcher& launcher, const DepthwiseArgs& a) {
  using Kernel = DepthwiseWeightGradient<T>;
  const int64_t taps = a.channels * a.kernel_h * a.kernel_w;
  const int64_t grid[3] = {taps < (int64_t{1} << 20) ? taps : int64_t{1} << 20, 1, 1};
  launcher.template launch<Kernel>(grid, Kernel::kSharedBytes, a);
}

}  // namespace fxprune::gpu
