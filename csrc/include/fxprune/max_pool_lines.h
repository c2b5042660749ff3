// Max pooling: the rows of a window are joined into one padded line, of which the window's columns
// are joined. A window of one pixel with steps of two takes them from where they lie.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "fxprune/max_pool.h"

namespace fxprune {

// The columns of the window that begins at line[ox * stride_w], for kWidth results.
template <class V, class Pool>
typename V::Reg window_columns(const Pool& a, const float* line, int64_t ox) {
  constexpr int kW = V::kWidth;
  const auto column = [&](int64_t kx) {
    const float* p = line + ox * a.stride_w + kx * a.dilation_w;
    if (a.stride_w == 1) return V::load(p);
    if (a.stride_w == 2) return V::load_even(p, ~0u);
    float lanes[kW];
    for (int i = 0; i < kW; ++i) lanes[i] = ox + i < a.out_w ? p[i * a.stride_w] : 0.0f;
    return V::load(lanes);
  };
  auto largest = column(0);
  for (int64_t kx = 1; kx < a.kernel_w; ++kx) largest = V::highest(largest, column(kx));
  return largest;
}

template <class V>
typename V::Reg load_pixels(const float* p, int64_t n) {
  return V::load(p, V::first(n));
}
template <class V>
typename V::Reg load_pixels(const Bf16* p, int64_t n) {
  return V::load_bf16(p, n);
}
template <class V>
void store_pixels(float* p, int64_t n, typename V::Reg pixels) {
  V::store(p, V::first(n), pixels);
}
template <class V>
void store_pixels(Bf16* p, int64_t n, typename V::Reg pixels) {
  V::store_bf16(p, n, pixels);
}

// to[i] = from[2 i] for n <= kWidth numbers; `reads` has a bit for each number that may be read.
template <class V>
void every_second(const float* from, uint32_t reads, int64_t n, float* to) {
  V::store(to, V::first(n), V::load_even(from, reads));
}
template <class V>
void every_second(const Bf16* from, uint32_t reads, int64_t n, Bf16* to) {
  V::template plane_lanes<2>(from, reads, n, to);
}

template <class V, class T>
void every_second_pixel(const MaxPoolOf<T>& a, const PoolSpan& span) {
  for (int64_t c = span.first; c < span.last; ++c) {
    const T* plane = a.x + c * (a.height * a.width + a.x_gap);
    T* out = a.out + c * (a.out_h * a.out_w + a.out_gap);
    for (int64_t oy = span.begin; oy < span.end; ++oy) {
      const T* row = plane + oy * a.stride_h * a.width;
      for (int64_t ox = 0; ox < a.out_w; ox += V::kWidth) {
        const int64_t n = std::min<int64_t>(a.out_w - ox, V::kWidth);
        every_second<V>(row + 2 * ox, ~0u >> (33 - 2 * n), n, out + oy * a.out_w + ox);
      }
    }
  }
}

// line: pool_scratch() floats.
template <class V, class T>
void pool_lines(const MaxPoolOf<T>& a, const PoolSpan& span, float* line) {
  const bool one_pixel = a.kernel_h == 1 && a.kernel_w == 1 && a.pad_h == 0 && a.pad_w == 0;
  if (one_pixel && a.stride_w == 2) return every_second_pixel<V>(a, span);
  constexpr int kW = V::kWidth;
  const float least = -std::numeric_limits<float>::infinity();
  const int64_t length = pool_scratch(a, kW);
  for (int64_t i = 0; i < length; ++i) line[i] = least;
  for (int64_t c = span.first; c < span.last; ++c) {
    const T* plane = a.x + c * (a.height * a.width + a.x_gap);
    T* out = a.out + c * (a.out_h * a.out_w + a.out_gap);
    for (int64_t oy = span.begin; oy < span.end; ++oy) {
      float* row = line + a.pad_w;
      const int64_t top = oy * a.stride_h - a.pad_h;
      // Rows of the window on the image: [first, last) of kernel_h.
      int64_t first = 0, last = a.kernel_h;
      while (first < last && top + first * a.dilation_h < 0) ++first;
      while (last > first && top + (last - 1) * a.dilation_h >= a.height) --last;
      const T* from = plane + (top + first * a.dilation_h) * a.width;
      for (int64_t x = 0; x < a.width; x += kW) {
        auto joined = V::set1(least);
        const T* row_at = from + x;
        for (int64_t ky = first; ky < last; ++ky, row_at += a.dilation_h * a.width)
          joined = V::highest(joined, load_pixels<V>(row_at, a.width - x));
        V::store(row + x, V::first(a.width - x), joined);
      }
      for (int64_t ox = 0; ox < a.out_w; ox += kW) {
        store_pixels<V>(out + oy * a.out_w + ox, a.out_w - ox, window_columns<V>(a, line, ox));
      }
    }
  }
}

template <class V>
void max_pool(const MaxPool& a, const PoolSpan& span, float* line) {
  pool_lines<V>(a, span, line);
}

template <class V>
void max_pool_bf16(const MaxPoolBf16& a, const PoolSpan& span, float* line) {
  pool_lines<V>(a, span, line);
}

}  // namespace fxprune
