// Arguments of max pooling, feature-major: out[c, oy, ox] is the largest of the window's pixels.
// What lies in the padding counts as minus infinity; a NaN in the window is the result.
#pragma once

#include <cstdint>

namespace fxprune {

struct MaxPool {
  const float* x;  // (channels, height, width)
  float* out;      // (channels, out_h, out_w)
  int64_t channels, height, width, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  int64_t x_gap = 0, out_gap = 0;  // numbers between two channels' pixels
};

// Channels [first, last), output rows [begin, end).
struct PoolSpan {
  int64_t first, last, begin, end;
};

// Floats of scratch: a padded line, and what vectors read beyond its end.
inline int64_t pool_scratch(const MaxPool& a, int64_t width) {
  return a.width + 2 * a.pad_w + a.dilation_w * a.kernel_w + 2 * width;
}

}  // namespace fxprune
