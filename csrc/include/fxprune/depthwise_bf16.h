// Depthwise convolution over kept taps in bfloat16: by dot products of pairs where the instruction
// set has them. Elsewhere the rows of a plane that a band reads are widened once, the float kernel
// runs on them in the near caches, and its result is rounded.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/depthwise_pairs.h"
#include "fxprune/depthwise_planes.h"

namespace fxprune {

// Outputs of a line, which tables and bands count in.
template <class V>
int64_t depthwise_bf16_width(const DepthwiseShape& a) {
  return V::kDotsPairs && a.stride_w == 1 ? 2 * V::kWidth : V::kWidth;
}

// `scratch`: depthwise_bf16_scratch floats.
template <class V>
void depthwise_taps_bf16(const DepthwiseTapsBf16& a, const PlaneSpan& span, float* scratch) {
  if constexpr (V::kDotsPairs) {
    if (a.vectorised()) return depthwise_pairs<V>(a, span, scratch);
  }
  constexpr int64_t kW = V::kWidth;
  const int64_t size = a.out_h * a.out_w, plane = a.height * a.width;
  const bool flat = a.flat(kW);
  // In a flat plane a band is vectors, anywhere in a row.
  const int64_t line = flat ? kW : a.out_w;
  const int64_t begin = span.band_begin * line, end = std::min(span.band_end * line, size);
  int64_t first, last;
  rows_read(a, begin / a.out_w, (end + a.out_w - 1) / a.out_w, &first, &last);
  float *x = scratch, *out = scratch + (plane + 15) / 16 * 16;
  DepthwiseTaps wide{};
  static_cast<DepthwiseShape&>(wide) = a;
  for (int64_t i = span.begin; i < span.end; ++i) {
    const Bf16* from = a.x + i * (plane + a.x_gap);
    int64_t p = first * a.width;
    const int64_t stop = last * a.width;
    for (; p + kW <= stop; p += kW) V::store(x + p, V::load_bf16(from + p));
    for (; p < stop; ++p) x[p] = widen(from[p]);
    // The float kernel finds plane i where its one-plane arguments begin.
    wide.x = x - i * plane;
    wide.out = out - i * size;
    depthwise_taps<V>(wide, {i, i + 1, span.band_begin, span.band_end});
    Bf16* to = a.out + i * (size + a.out_gap);
    int64_t o = begin;
    for (; o + kW <= end; o += kW) V::store_bf16(to + o, V::load(out + o));
    for (; o < end; ++o) to[o] = narrow(out[o]);
  }
}

// x: (channels, size), planes `pitch` apart -> out: (channels), the mean of each plane.
template <class V>
void channel_mean_bf16(const Bf16* x, Bf16* out, int64_t channels, int64_t size, int64_t pitch) {
  constexpr int64_t kW = V::kWidth;
  for (int64_t c = 0; c < channels; ++c, x += pitch) {
    typename V::Reg sum = V::zero();
    int64_t i = 0;
    for (; i + kW <= size; i += kW) sum = V::add(sum, V::load_bf16(x + i));
    if (i < size) sum = V::add(sum, V::load_bf16(x + i, size - i));
    out[c] = narrow(V::sum(sum) / static_cast<float>(size));
  }
}

}  // namespace fxprune
