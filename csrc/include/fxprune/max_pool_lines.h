// Max pooling: the rows of a window are joined into one padded line, of which the window's columns
// are joined.
#pragma once

#include <cstdint>
#include <limits>

#include "fxprune/max_pool.h"

namespace fxprune {

// The columns of the window that begins at line[ox * stride_w], for kWidth results.
template <class V>
typename V::Reg window_columns(const MaxPool& a, const float* line, int64_t ox) {
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

// line: pool_scratch() floats.
template <class V>
void max_pool(const MaxPool& a, const PoolSpan& span, float* line) {
  constexpr int kW = V::kWidth;
  const float least = -std::numeric_limits<float>::infinity();
  const int64_t length = pool_scratch(a, kW);
  for (int64_t i = 0; i < length; ++i) line[i] = least;
  for (int64_t c = span.first; c < span.last; ++c) {
    const float* plane = a.x + c * (a.height * a.width + a.x_gap);
    float* out = a.out + c * (a.out_h * a.out_w + a.out_gap);
    for (int64_t oy = span.begin; oy < span.end; ++oy) {
      float* row = line + a.pad_w;
      bool joins = false;
      for (int64_t ky = 0; ky < a.kernel_h; ++ky) {
        const int64_t y = oy * a.stride_h - a.pad_h + ky * a.dilation_h;
        if (y < 0 || y >= a.height) continue;
        const float* from = plane + y * a.width;
        for (int64_t x = 0; x < a.width; x += kW) {
          const auto mask = V::first(a.width - x);
          const auto pixels = V::load(from + x, mask);
          V::store(row + x, mask, joins ? V::highest(V::load(row + x, mask), pixels) : pixels);
        }
        joins = true;
      }
      for (int64_t x = 0; x < a.width && !joins; ++x) row[x] = least;
      for (int64_t ox = 0; ox < a.out_w; ox += kW) {
        V::store(out + oy * a.out_w + ox, V::first(a.out_w - ox), window_columns<V>(a, line, ox));
      }
    }
  }
}

}  // namespace fxprune
