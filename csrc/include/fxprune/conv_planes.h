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

  // The first `count` numbers of a vector of a row, every Stride-th number: lanes off the image are
  // off in the mask.
  template <int Stride>
  static void lanes(const float* x, uint32_t mask, int64_t count, float* to) {
    V::store(to, V::first(count), Stride == 1 ? V::load(x, V::bits(mask)) : V::load_even(x, mask));
  }
  template <int Stride>
  static void lanes(const Bf16* x, uint32_t mask, int64_t count, Bf16* to) {
    V::template plane_lanes<Stride>(x, mask, count, to);
  }

  template <int Stride>
  static void copy_row(const T* x, const uint32_t* masks, int64_t count, T* to) {
    for (; count > 0; x += Stride * kW, to += kW, count -= kW)
      lanes<Stride>(x, *masks++, count, to);
  }

  static void copy_row(const TileConvOf<T>& a, const T* x, int64_t begin, T* to) {
    for (int64_t i = 0; i < a.pitch; ++i) {
      const int64_t at = begin + i * a.stride_w;
      to[i] = at >= 0 && at < a.width ? x[at] : T{};
    }
  }
};

// The rows of x that the band behind a span will read and the span did not, a line of memory after
// the other: they are asked for while the span is computed. None where x is near anyway.
template <class T>
class RowsAhead {
 public:
  RowsAhead(const TileConvOf<T>& a, const ConvSpan& span) {
    constexpr int64_t kNear = 128 * 1024;  // numbers
    const int64_t plane = a.height * a.width, next = span.row + span.rows;
    if (a.channels * plane <= kNear || next >= a.out_h) return;
    const int64_t read = (next - 1) * a.stride_h - a.pad_h + (a.kernel_h - 1) * a.dilation_h + 1,
                  from = std::clamp<int64_t>(read, 0, a.height),
                  rows = std::min(a.band_rows * a.stride_h, a.height - from);
    at_ = reinterpret_cast<const char*>(a.x + span.image * a.channels * plane + from * a.width);
    pitch_ = plane * static_cast<int64_t>(sizeof(T));
    bytes_ = rows * a.width * static_cast<int64_t>(sizeof(T));
    channels_ = a.channels;
  }
  // The address of the next `count` lines; null where there are none left.
  const char* take(int64_t count) {
    if (channels_ == 0) return nullptr;
    const char* lines = at_ + done_;
    done_ += count * kLine;
    if (done_ >= bytes_) {
      at_ += pitch_;
      done_ = 0;
      --channels_;
    }
    return lines;
  }

  static constexpr int64_t kLine = 64;

 private:
  const char* at_ = nullptr;
  int64_t pitch_ = 0, bytes_ = 0, channels_ = 0, done_ = 0;
};

// Fills channels [begin, end) of a band's copy. Rows of x are read in their order, which is what
// memory is fast at.
template <class V, class T>
void conv_planes_of(const TileConvOf<T>& a, const ConvSpan& span, int64_t begin, int64_t end,
                    T* copy) {
  using P = ConvPlanes<V, T>;
  const int64_t first = span.row * a.stride_h, vecs = (a.pitch + P::kW - 1) / P::kW,
                planes = a.row_planes * a.column_planes,
                rows = a.plane_rows - a.band_rows + span.rows;
  for (int64_t c = begin; c < end; ++c) {
    const T* image = a.x + (span.image * a.channels + c) * a.height * a.width;
    T* const channel = copy + c * a.channel_size();
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t p = 0; p < planes; ++p) {
        const int64_t r = p / a.column_planes, s = p % a.column_planes;
        const int64_t y = first + a.row_begin[r] + i * a.stride_h, left = a.column_begin[s];
        const T* row = image + y * a.width;
        const uint32_t* masks = a.masks + s * vecs;
        T* to = channel + p * a.plane_size() + i * a.pitch;
        if (y < 0 || y >= a.height) {
          std::fill_n(to, a.pitch, T{});
        } else if (a.stride_w == 1) {
          P::template copy_row<1>(row + left, masks, a.pitch, to);
        } else if (a.stride_w == 2) {
          P::template copy_row<2>(row + left, masks, a.pitch, to);
        } else {
          P::copy_row(a, row, left, to);
        }
      }
    }
    for (int64_t p = 0; p < planes; ++p)
      std::fill_n(channel + p * a.plane_size() + rows * a.pitch, a.gap, T{});
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
