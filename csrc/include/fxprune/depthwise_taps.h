// Arguments of the depthwise convolution over kept taps, and the choice of its strategy.
//
//   y[b, c, oy, ox] = act(sum over kept t = (dy, dx) of w[c, t] * x[b, c, oy*sh + dy*dh - ph, ox*sw
//   + dx*dw - pw] + bias[c])
//
// The padding is never stored: a lane that falls into it is switched off by a mask. Masks depend on
// the geometry alone, so they are computed once per call and shared by all channels.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/activation.h"
#include "fxprune/bf16.h"

namespace fxprune {

// Where a window position reads, the same for every channel.
struct TapSite {
  int64_t offset;  // of its input element from the one at output position (0, 0) without padding
  int64_t row;     // its vertical part: dy*dh - ph
  const uint32_t*
      masks;  // its lanes inside the image, one mask per vector of the plane (flat) or of a row
};

// What a depthwise convolution is apart from its activations. Weights are float whatever these are.
struct DepthwiseShape {
  const float* weight;   // (channels, kernel_h * kernel_w)
  const uint64_t* taps;  // (channels, tap_words): bit t%64 of word t/64 keeps tap t
  const float* bias;     // (channels) or null
  int64_t batch, channels, height, width, out_h, out_w, tap_words;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Activation activation;
  const TapSite* sites;  // kernel() of them, filled by depthwise_sites
  const float* zeros;    // a row of zeros, width floats

  int64_t kernel() const { return kernel_h * kernel_w; }
  // Strides beyond 2 along a row have no vector kernel, and then neither sites nor zeros.
  bool vectorised() const { return stride_w <= 2; }
  // Output and input planes coincide: a tap is one constant offset in the flattened plane, and
  // vectors may run across row ends. That pays while a row fills at most a vector poorly, or two
  // long ones.
  bool flat(int64_t vector_width) const {
    return stride_h == 1 && stride_w == 1 && out_h == height && out_w == width &&
           width < (vector_width > 8 ? 2 : 1) * vector_width;
  }
};

template <class T>
struct DepthwiseTapsOf : DepthwiseShape {
  const T* x;  // (batch, channels, height, width)
  T* out;      // (batch, channels, out_h, out_w)
  // Numbers from the end of a plane to the next one's start, as in TileGemmOf.
  int64_t x_gap = 0, out_gap = 0;
};

using DepthwiseTaps = DepthwiseTapsOf<float>;
using DepthwiseTapsBf16 = DepthwiseTapsOf<Bf16>;

// One unit of work: planes [begin, end) of batch * channels, and of each the band [band_begin,
// band_end): vectors of a flat plane, output rows of any other.
struct PlaneSpan {
  int64_t begin, end, band_begin, band_end;
};

// What a plane can be cut in: see PlaneSpan.
inline int64_t band_length(const DepthwiseShape& a, int64_t vector_width) {
  return a.flat(vector_width) ? (a.out_h * a.out_w + vector_width - 1) / vector_width : a.out_h;
}

// Pixels [begin, end) of an input plane, whole rows of it, that the band [begin, end) of outputs
// reads.
struct PixelRange {
  int64_t begin, end;
};

inline PixelRange band_input(const DepthwiseShape& a, int64_t vector_width, int64_t begin,
                             int64_t end) {
  const int64_t line = a.flat(vector_width) ? vector_width : a.out_w;
  const int64_t last = std::min(end * line, a.out_h * a.out_w) - 1;  // output pixel
  const int64_t top = begin * line / a.out_w * a.stride_h - a.pad_h;
  const int64_t bottom = last / a.out_w * a.stride_h - a.pad_h + (a.kernel_h - 1) * a.dilation_h;
  const int64_t from = std::clamp<int64_t>(top, 0, a.height);
  return {from * a.width, std::clamp<int64_t>(bottom + 1, from, a.height) * a.width};
}

// Length of the mask table, for vectors of `vector_width`: flat planes have one mask per tap and
// vector, rows one per column of the window and vector. A mask holds one bit per input lane that a
// vector's load touches.
inline int64_t depthwise_mask_count(const DepthwiseShape& a, int64_t vector_width) {
  if (a.flat(vector_width)) {
    return a.kernel() * ((a.out_h * a.out_w + vector_width - 1) / vector_width);
  }
  return a.kernel_w * ((a.out_w + vector_width - 1) / vector_width);
}

// Sets bits [begin, end) in a row of masks that hold `lanes` bits each.
inline void set_mask_bits(uint32_t* masks, int64_t lanes, int64_t begin, int64_t end) {
  while (begin < end) {
    const int64_t lane = begin % lanes, count = std::min(lanes - lane, end - begin);
    masks[begin / lanes] |= static_cast<uint32_t>(((uint64_t{1} << count) - 1) << lane);
    begin += count;
  }
}

// Output positions [first, last) of one axis whose input, offset by `tap` elements, lies in [0,
// size).
inline void valid_range(int64_t tap, int64_t stride, int64_t size, int64_t count, int64_t* first,
                        int64_t* last) {
  *first = std::clamp<int64_t>(tap >= 0 ? 0 : (-tap + stride - 1) / stride, 0, count);
  *last = std::clamp<int64_t>(size > tap ? (size - tap + stride - 1) / stride : 0, *first, count);
}

// Fills `sites` (kernel() of them) and `masks` (depthwise_mask_count of them, zeroed).
inline void depthwise_sites(const DepthwiseShape& a, int64_t vector_width, TapSite* sites,
                            uint32_t* masks) {
  const bool flat = a.flat(vector_width);
  const int64_t vecs = ((flat ? a.out_h : 1) * a.out_w + vector_width - 1) / vector_width;
  for (int64_t t = 0; t < a.kernel(); ++t) {
    const int64_t dy = t / a.kernel_w, dx = t % a.kernel_w, row = dy * a.dilation_h - a.pad_h;
    sites[t] = {row * a.width + dx * a.dilation_w - a.pad_w, row, masks + (flat ? t : dx) * vecs};
  }
  if (flat) {
    for (int64_t t = 0; t < a.kernel(); ++t, masks += vecs) {
      int64_t top, bottom, left, right;
      valid_range(t / a.kernel_w * a.dilation_h - a.pad_h, 1, a.height, a.out_h, &top, &bottom);
      valid_range(t % a.kernel_w * a.dilation_w - a.pad_w, 1, a.width, a.out_w, &left, &right);
      for (int64_t y = top; y < bottom; ++y)
        set_mask_bits(masks, vector_width, y * a.width + left, y * a.width + right);
    }
    return;
  }
  const int64_t lanes = vector_width * a.stride_w;
  for (int64_t dx = 0; dx < a.kernel_w; ++dx, masks += vecs) {
    int64_t left, right;
    valid_range(dx * a.dilation_w - a.pad_w, a.stride_w, a.width, a.out_w, &left, &right);
    // A strided vector loads the input lanes in between as well; those past the last wanted one may
    // not exist.
    if (left < right) set_mask_bits(masks, lanes, left * a.stride_w, (right - 1) * a.stride_w + 1);
  }
}

// The input rows that output rows [begin, end) read: [*first, *last).
inline void rows_read(const DepthwiseShape& a, int64_t begin, int64_t end, int64_t* first,
                      int64_t* last) {
  const int64_t top = begin * a.stride_h - a.pad_h;
  const int64_t bottom = (end - 1) * a.stride_h - a.pad_h + (a.kernel_h - 1) * a.dilation_h + 1;
  *first = std::clamp<int64_t>(top, 0, a.height);
  *last = std::clamp<int64_t>(bottom, *first, a.height);
}

// Floats of scratch of the bfloat16 kernels: the pairs of a channel's taps, each of which comes in
// up to three parts; a plane of x; one of the result, or blocks of sums of its rows.
inline int64_t depthwise_lists(const DepthwiseShape& a) {
  constexpr int64_t kPair = 8;  // floats of a TapPair
  return (kPair * (3 * a.kernel() + 1) / 2 + 15) / 16 * 16;
}
inline int64_t depthwise_bf16_scratch(const DepthwiseShape& a) {
  constexpr int64_t kSums = 8 * 32;
  return depthwise_lists(a) + a.height * a.width + a.out_h * a.out_w + kSums;
}

}  // namespace fxprune
