// Depthwise convolution over kept taps, plane by plane.
//
// flat:  stride 1 and equal planes of narrow rows; vectors run over the flattened plane.
// rows:  vectors run along output rows, in blocks of kRows rows; a window row outside the image
// reads a row of zeros. Where masked loads are dear, depthwise_padded.h does the same from a copy.
// plain: any other stride along the row; scalar, it is no layer that occurs
// in practice.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "fxprune/depthwise_lists.h"
#include "fxprune/depthwise_padded.h"
#include "fxprune/math.h"
#include "fxprune/unroll.h"

namespace fxprune {

template <class V>
struct Depthwise {
  using Reg = typename V::Reg;
  static constexpr int kW = V::kWidth;
  // Sums per block: more hide a multiply-add's latency no better, but a plane of 14 x 14 is one.
  static constexpr int kFlatVecs = 2 * V::kAccumulators / 3;
  // Rows of a block, and vectors of each; narrow planes are cut in blocks of more rows, of which
  // networks for images of 224 x 224 have a multiple.
  static constexpr int kRows = 4, kTall = 7;
  static constexpr int kRowVecs = std::min(4, V::kAccumulators / kRows);
  static constexpr int kTallVecs = std::min(2, V::kAccumulators / kTall);

  struct Plane {
    const DepthwiseTaps* args;
    const float* x;
    float* out;
    int64_t channel;
    const float* weight;  // of the channel
    float bias;
  };

  template <int Vecs>
  static void flat_block(const Plane& p, int64_t first) {
    const DepthwiseTaps& a = *p.args;
    const float* base = p.x + first * kW;
    Reg acc[1][Vecs];
    FXPRUNE_UNROLL
    for (int v = 0; v < Vecs; ++v) acc[0][v] = V::set1(p.bias);
    for (KeptTaps tap(a, p.channel); tap; ++tap) {
      const Reg weight = V::set1(p.weight[*tap]);
      const TapSite& site = a.sites[*tap];
      const float* x = base + site.offset;
      const uint32_t* masks = site.masks + first;
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v)
        acc[0][v] = V::fma_load(weight, x + v * kW, V::bits(masks[v]), acc[0][v]);
    }
    end_sums<V>(a.activation, acc);
    float* out = p.out + first * kW;
    FXPRUNE_UNROLL
    for (int v = 0; v + 1 < Vecs; ++v) V::store(out + v * kW, acc[0][v]);
    const int64_t tail = a.out_h * a.out_w - (first + Vecs - 1) * kW;
    V::store(out + (Vecs - 1) * kW, V::first(tail), acc[0][Vecs - 1]);
  }

  // Output rows [oy, oy + Rows) x vectors [first, first + Vecs). Inside: every window row lies in
  // the image.
  template <int Vecs, int Rows, int Stride, bool Inside>
  static void row_block(const Plane& p, int64_t oy, int64_t first) {
    const DepthwiseTaps& a = *p.args;
    const int64_t height = a.height, pitch = a.stride_h * a.width, column = first * kW * Stride;
    const int64_t top = oy * a.stride_h;
    const float* base = p.x + oy * pitch + column;
    Reg acc[Rows][Vecs];
    FXPRUNE_UNROLL
    for (int r = 0; r < Rows; ++r) {
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v) acc[r][v] = V::set1(p.bias);
    }
    for (KeptTaps tap(a, p.channel); tap; ++tap) {
      const Reg weight = V::set1(p.weight[*tap]);
      const TapSite& site = a.sites[*tap];
      const uint32_t* masks = site.masks + first;
      const float* row = base + site.offset;
      FXPRUNE_UNROLL
      for (int r = 0; r < Rows; ++r, row += pitch) {
        const float* x = row;
        if (!Inside) {
          const int64_t iy = top + site.row + r * a.stride_h;
          // The row of zeros stands in for a row of the image: same columns, same masks.
          if (iy < 0 || iy >= height) x = a.zeros + (column + site.offset - site.row * a.width);
        }
        FXPRUNE_UNROLL
        for (int v = 0; v < Vecs; ++v) {
          const float* at = x + v * kW * Stride;
          acc[r][v] = Stride == 1 ? V::fma_load(weight, at, V::bits(masks[v]), acc[r][v])
                                  : V::fma(weight, V::load_even(at, masks[v]), acc[r][v]);
        }
      }
    }
    end_sums<V>(a.activation, acc);
    const auto tail = V::first(a.out_w - (first + Vecs - 1) * kW);
    const int64_t ldo = a.out_w;
    float* out = p.out + oy * ldo + first * kW;
    FXPRUNE_UNROLL
    for (int r = 0; r < Rows; ++r, out += ldo) {
      FXPRUNE_UNROLL
      for (int v = 0; v + 1 < Vecs; ++v) V::store(out + v * kW, acc[r][v]);
      V::store(out + (Vecs - 1) * kW, tail, acc[r][Vecs - 1]);
    }
  }

  template <int... I>
  static constexpr std::array<void (*)(const Plane&, int64_t), sizeof...(I)> flat_table(
      std::integer_sequence<int, I...>) {
    return {{&flat_block<I + 1>...}};
  }

  using RowKernel = void (*)(const Plane&, int64_t, int64_t);

  template <int Rows, int Stride, bool Inside, int... I>
  static constexpr std::array<RowKernel, sizeof...(I)> row_table(std::integer_sequence<int, I...>) {
    return {{&row_block<I + 1, Rows, Stride, Inside>...}};
  }
  // The kernels of `Rows` rows, by the number of vectors less one.
  template <int Rows, int Stride>
  static const RowKernel* row_kernels(bool inside) {
    using Vecs = std::make_integer_sequence<int, Rows == kTall ? kTallVecs : kRowVecs>;
    static constexpr auto kInside = row_table<Rows, Stride, true>(Vecs()),
                          kEdge = row_table<Rows, Stride, false>(Vecs());
    return inside ? kInside.data() : kEdge.data();
  }

  static void flat(const Plane& p, int64_t begin, int64_t end) {
    static constexpr auto kKernels = flat_table(std::make_integer_sequence<int, kFlatVecs>());
    const int64_t vecs = end - begin, blocks = (vecs + kFlatVecs - 1) / kFlatVecs;
    int64_t first = begin;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t here = vecs / blocks + (b < vecs % blocks);
      kKernels[here - 1](p, first);
      first += here;
    }
  }

  template <int Stride>
  static void rows(const Plane& p, int64_t begin, int64_t end) {
    const DepthwiseTaps& a = *p.args;
    const int64_t vecs = (a.out_w + kW - 1) / kW, blocks = (vecs + kRowVecs - 1) / kRowVecs;
    const int64_t step = end - begin < kRows                         ? 1
                         : end - begin >= kTall && vecs <= kTallVecs ? kTall
                                                                     : kRows;
    const int64_t reach = (a.kernel_h - 1) * a.dilation_h + (step - 1) * a.stride_h;
    for (int64_t start = begin; start < end; start += step) {
      // The last block of rows is moved up to be whole; rows it shares with its neighbour are
      // computed twice, alike.
      const int64_t oy = std::min(start, end - step), top = oy * a.stride_h - a.pad_h;
      const bool inside = top >= 0 && top + reach < a.height;
      const RowKernel* kernels = step == kTall   ? row_kernels<kTall, Stride>(inside)
                                 : step == kRows ? row_kernels<kRows, Stride>(inside)
                                                 : row_kernels<1, Stride>(inside);
      int64_t first = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t here = vecs / blocks + (b < vecs % blocks);
        kernels[here - 1](p, oy, first);
        first += here;
      }
    }
  }

  static void plain(const Plane& p, int64_t, int64_t) {
    const DepthwiseTaps& a = *p.args;
    const int64_t size = a.out_h * a.out_w;
    std::fill(p.out, p.out + size, p.bias);
    for (KeptTaps tap(a, p.channel); tap; ++tap) {
      const int64_t t = *tap;
      const float weight = p.weight[t];
      const int64_t down = t / a.kernel_w * a.dilation_h - a.pad_h,
                    right = t % a.kernel_w * a.dilation_w - a.pad_w;
      int64_t top, bottom, left, end;
      valid_range(down, a.stride_h, a.height, a.out_h, &top, &bottom);
      valid_range(right, a.stride_w, a.width, a.out_w, &left, &end);
      for (int64_t oy = top; oy < bottom; ++oy) {
        const float* x = p.x + (oy * a.stride_h + down) * a.width + right;
        float* out = p.out + oy * a.out_w;
        for (int64_t ox = left; ox < end; ++ox) out[ox] += weight * x[ox * a.stride_w];
      }
    }
    const Clamp clamp = clamp_of(a.activation);
    for (int64_t i = 0; i < size; ++i) {
      const float y = p.out[i];
      p.out[i] = y < clamp.low ? clamp.low : y > clamp.high ? clamp.high : y;
    }
    if (!is_clamp(a.activation)) activate<V>(a.activation, p.out, size);
  }
};

// A plane without a vector kernel is not cut: its band is all its rows.
template <class V>
void depthwise_taps(const DepthwiseTaps& a, const PlaneSpan& span) {
  using D = Depthwise<V>;
  const int64_t size = a.out_h * a.out_w, begin = span.band_begin, end = span.band_end;
  const int64_t line = a.flat(V::kWidth) ? V::kWidth : a.out_w;  // floats a band counts in
  const int64_t written = begin * line, count = std::min(end * line, size) - written;
  const auto band = !a.vectorised()     ? &D::plain
                    : a.flat(V::kWidth) ? &D::flat
                    : a.stride_w == 1   ? &D::template rows<1>
                                        : &D::template rows<2>;
  const bool apart = a.vectorised() && !ends_in_registers(a.activation);
  if constexpr (V::kMasksCost) {
    if (PaddedDepthwise<V>::fits(a) && !a.flat(V::kWidth)) {
      PaddedDepthwise<V> padded(a, begin, end, span.end - span.begin);
      const int64_t x_pitch = a.height * a.width + a.x_gap, out_pitch = size + a.out_gap;
      for (int64_t i = span.begin, here; i < span.end; i += here) {
        const int64_t channel = i % a.channels;
        here = std::min({padded.together(), span.end - i, a.channels - channel});
        float* out = a.out + i * out_pitch;
        padded.run(a.x + i * x_pitch, x_pitch, channel, here, out, out_pitch);
        for (int64_t p = 0; p < here && apart; ++p)
          activate<V>(a.activation, out + p * out_pitch + written, count);
      }
      return;
    }
  }
  for (int64_t i = span.begin; i < span.end; ++i) {
    const int64_t c = i % a.channels;
    const typename D::Plane plane = {&a,
                                     a.x + i * (a.height * a.width + a.x_gap),
                                     a.out + i * (size + a.out_gap),
                                     c,
                                     a.weight + c * a.kernel(),
                                     a.bias ? a.bias[c] : 0.0f};
    band(plane, begin, end);
    if (apart) activate<V>(a.activation, plane.out + written, count);
  }
}

}  // namespace fxprune
