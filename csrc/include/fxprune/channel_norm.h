// Arguments of LayerNorm over the channels of each pixel, feature-major.
//
//   out[c, p] = (x[c, p] - mean[p]) / sqrt(variance[p] + eps) * weight[c] + bias[c]
//
// Mean and variance (of the differences from it) are over the channels of one pixel, and each is
// one sum in their order, however the pixels are cut. Sums are float whatever the pixels are.
#pragma once

#include <cstdint>

#include "fxprune/bf16.h"

namespace fxprune {

template <class T>
struct ChannelNormOf {
  const T* x;           // (channels, size)
  T* out;               // (channels, size)
  const float* weight;  // (channels) or null: ones
  const float* bias;    // (channels) or null: zeros
  int64_t channels, size;
  float eps;
  int64_t x_gap = 0, out_gap = 0;  // numbers between two channels' pixels
};

using ChannelNorm = ChannelNormOf<float>;
using ChannelNormBf16 = ChannelNormOf<Bf16>;

}  // namespace fxprune
