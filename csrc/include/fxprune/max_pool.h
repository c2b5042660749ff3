// Arguments of max pooling, feature-major: out[c, oy, ox] is the largest of the window's pixels.
// What lies in the padding counts as minus infinity; a NaN in the window is the result.
#pragma once

#include <cstdint>

#include "fxprune/bf16.h"

namespace fxprune {

template <class T>
struct MaxPoolOf {
  const T* x;  // (channels, height, width)
  T* out;      // (channels, out_h, out_w)
  int64_t channels, height, width, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t x_gap = 0, out_gap = 0;  // numbers between two channels' pixels
};

using MaxPool = MaxPoolOf<float>;
using MaxPoolBf16 = MaxPoolOf<Bf16>;

// Channels [first, last), output rows [begin, end).
struct PoolSpan {
  int64_t first, last, begin, end;
};

// Floats of scratch: a padded line, and what vectors read beyond its end.
template <class T>
int64_t pool_scratch(const MaxPoolOf<T>& a, int64_t width) {
  return a.width + 2 * a.pad_w + a.dilation_w * a.kernel_w + 2 * width;
}

}  // namespace fxprune
