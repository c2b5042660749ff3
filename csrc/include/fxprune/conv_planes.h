// The copy of a band of a convolution's input into planes (tile_conv.h). Include only under a
// target pragma.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/tile_conv.h"

namespace fxprune {

// Rows of planes of T, float or Bf16.
template <class V, class T>
struct ConvPlanes {
  static constexpr int64_t kW = V::kWidth;

  // One vector of a row, every Stride-th number: lanes off the image are off in the mask.
  template <int Stride>
  static void lanes(const float* x, uint32_t mask, float* to) {
    V::store(to, Stride == 1 ? V::load(x, V::bits(mask)) : V::load_even(x, mask));
  }
  template <int Stride>
  static void lanes(const Bf16* x, uint32_t mask, Bf16* to) {
    V::template plane_lanes<Stride>(x, mask, to);
  }

  // Writes whole vectors; what lies beyond the row is the next row's and written later.
  template <int Stride>
  static void copy_row(const T* x, const uint32_t* masks, int64_t vecs, T* to) {
    for (int64_t v = 0; v < vecs; ++v, x += Stride * kW) lanes<Stride>(x, masks[v], to + v * kW);
  }

  static void copy_row(const TileConvOf<T>& a, const T* x, int64_t begin, T* to) {
    for (int64_t i = 0; i < a.pitch; ++i) {
      const int64_t at = begin + i * a.stride_w;
      to[i] = at >= 0 && at < a.width ? x[at] : T{};
    }
  }
};

// Fills channels [begin, end) of a band's copy, which has room for two vectors behind the last.
template <class V, class T>
void conv_planes_of(const TileConvOf<T>& a, const ConvSpan& span, int64_t begin, int64_t end,
                    T* copy) {
  using P = ConvPlanes<V, T>;
  const int64_t first = span.row * a.stride_h, vecs = (a.pitch + P::kW - 1) / P::kW;
  T* to = copy + begin * a.channel_size();
  for (int64_t c = begin; c < end; ++c) {
    const T* image = a.x + (span.image * a.channels + c) * a.height * a.width;
    for (int64_t r = 0; r < a.row_planes; ++r) {
      for (int64_t s = 0; s < a.column_planes; ++s) {
        const int64_t left = a.column_begin[s];
        const uint32_t* masks = a.masks + s * vecs;
        for (int64_t i = 0; i < a.plane_rows; ++i, to += a.pitch) {
          const int64_t y = first + a.row_begin[r] + i * a.stride_h;
          const T* row = image + y * a.width;
          if (y < 0 || y >= a.height) {
            std::fill_n(to, a.pitch, T{});
          } else if (a.stride_w == 1) {
            P::template copy_row<1>(row + left, masks, vecs, to);
          } else if (a.stride_w == 2) {
            P::template copy_row<2>(row + left, masks, vecs, to);
          } else {
            P::copy_row(a, row, left, to);
          }
        }
        std::fill_n(to, a.gap, T{});
        to += a.gap;
      }
    }
  }
}

template <class V>
void conv_planes(const TileConv& a, const ConvSpan& span, int64_t begin, int64_t end, float* copy) {
  conv_planes_of<V>(a, span, begin, end, copy);
}
template <class V>
void conv_planes_bf16(const TileConvBf16& a, const ConvSpan& span, int64_t begin, int64_t end,
                      Bf16* copy) {
  conv_planes_of<V>(a, span, begin, end, copy);
}

}  // namespace fxprune
