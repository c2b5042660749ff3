// Where an implicit GEMM finds its tokens: K row (channel, dy, dx) of output pixel (oy, ox) is
// input pixel (oy*sh + dy*dh - ph, ox*sw + dx*dw - pw) of that channel, or a zero outside of the
// image.
#pragma once

#include "fxprune/cuda/tile_gemm_args.cuh"

namespace fxprune::gpu {

// N output pixels in a row, for one tile and image. T: the element type.
template <class T, int N>
struct WindowTokens {
  const T* x;  // the channels that the tile's group reads
  int top[N],
      left[N];  // the input pixel under the window's first tap; far outside past the last token

  FXPRUNE_GPU WindowTokens(const TileGemmArgs& a, int64_t tile, int64_t image, int64_t token) {
    const TileWindow& w = a.window;
    const int64_t feature = load_global<int32_t>(a.columns + tile * a.granularity);
    const int64_t group = feature / (a.n / w.groups);
    x = static_cast<const T*>(a.x) +
        (image * w.channels + group * (w.channels / w.groups)) * w.height * w.width;
    int row = static_cast<int>(token / w.out_w), column = static_cast<int>(token % w.out_w);
    FXPRUNE_UNROLLED
    for (int j = 0; j < N; ++j) {
      top[j] = token + j < a.m ? row * w.stride_h - w.pad_h : kOutside;
      left[j] = column * w.stride_w - w.pad_w;
      if (++column == w.out_w) {
        column = 0;
        ++row;
      }
    }
  }

  struct Tap {
    int64_t channel;
    int down, right;
  };
  static FXPRUNE_GPU Tap tap_of(const TileWindow& w, int32_t k) {
    const uint32_t size = static_cast<uint32_t>(w.kernel_h * w.kernel_w),
                   at = static_cast<uint32_t>(k);
    const uint32_t t = at % size, columns = static_cast<uint32_t>(w.kernel_w);
    return {at / size, static_cast<int>(t / columns) * w.dilation_h,
            static_cast<int>(t % columns) * w.dilation_w};
  }

  // Eight pixels of K row `k`, 16 bits each, into shared memory; zeros for one that pads (`real` is
  // false).
  FXPRUNE_GPU void copy(const TileWindow& w, int32_t k, bool real, char* to) const {
    const Tap tap = tap_of(w, k);
    uint16_t element[8];
    FXPRUNE_UNROLLED
    for (int j = 0; j < 8; ++j) {
      bool inside;
      const T* from = at(w, tap, j, &inside);
      element[j] = real && inside ? load_global<T>(from).bits : uint16_t{0};
    }
    store_shared<Quad>(to, quad_of(element));
  }

  // The address of pixel j under a tap, and whether it lies on the image.
  FXPRUNE_GPU const T* at(const TileWindow& w, const Tap& tap, int j, bool* inside) const {
    const int row = top[j] + tap.down, column = left[j] + tap.right;
    *inside = row >= 0 && row < w.height && column >= 0 && column < w.width;
    return x + (tap.channel * w.height + row) * w.width + column;
  }

 private:
  static constexpr int kOutside = -(1 << 30);  // no window reaches back from there
};

// In their place where no window moves over an image.
struct NoTokens {
  FXPRUNE_GPU NoTokens(const TileGemmArgs&, int64_t, int64_t, int64_t) {}
};

}  // namespace fxprune::gpu
