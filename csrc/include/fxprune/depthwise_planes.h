// Depthwise convolution over kept taps, plane by plane.
//
// flat:  stride 1 and equal planes of narrow rows; vectors run over the flattened plane.
// rows:  vectors run along output rows, in blocks of kRows rows; a window row outside the image reads a row of zeros.
// plain: any other stride along the row; scalar, it is no layer that occurs in practice.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "fxprune/depthwise_taps.h"
#include "fxprune/math.h"
#include "fxprune/unroll.h"

namespace fxprune {

template <class V>
struct Depthwise {
  using Reg = typename V::Reg;
  static constexpr int kW = V::kWidth;
  static constexpr int kFlatVecs = 8;  // sums per block: enough to hide the latency of a multiply-add
  static constexpr int kRows = 4;
  static constexpr int kRowVecs = std::min(4, V::kAccumulators / kRows);

  // Lists channel c's kept taps; `offset` is relative to the input element under window position (0, 0).
  static int64_t list_taps(const DepthwiseTaps& a, int64_t c, Tap* taps) {
    int64_t count = 0;
    for (int64_t word = 0; word < a.tap_words; ++word) {
      for (uint64_t bits = a.taps[c * a.tap_words + word]; bits; bits &= bits - 1) {
        const int64_t t = word * 64 + __builtin_ctzll(bits);
        const int64_t dy = t / a.kernel_w, dx = t % a.kernel_w;
        taps[count++] = {a.weight[c * a.kernel() + t], static_cast<int32_t>(t),
                         dy * a.dilation_h * a.width + dx * a.dilation_w};
      }
    }
    return count;
  }

  struct Plane {
    const DepthwiseTaps* args;
    const float* x;
    float* out;
    const Tap* taps;
    int64_t count;
    float bias;
    Clamp clamp;
  };

  template <int Vecs>
  static void flat_block(const Plane& p, int64_t first) {
    const DepthwiseTaps& a = *p.args;
    const int64_t size = a.out_h * a.out_w, vecs = (size + kW - 1) / kW;
    const int64_t base = first * kW - a.pad_h * a.width - a.pad_w;
    Reg acc[Vecs];
    FXPRUNE_UNROLL
    for (int v = 0; v < Vecs; ++v) acc[v] = V::set1(p.bias);
    for (int64_t i = 0; i < p.count; ++i) {
      const Tap& tap = p.taps[i];
      const Reg weight = V::set1(tap.weight);
      const float* x = p.x + (base + tap.offset);
      const uint32_t* masks = a.masks + tap.id * vecs + first;
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v) acc[v] = V::fma(weight, V::load(x + v * kW, V::bits(masks[v])), acc[v]);
    }
    const Reg low = V::set1(p.clamp.low), high = V::set1(p.clamp.high);
    float* out = p.out + first * kW;
    FXPRUNE_UNROLL
    for (int v = 0; v < Vecs; ++v) {
      const Reg y = V::min(high, V::max(low, acc[v]));
      if (v + 1 < Vecs) {
        V::store(out + v * kW, y);
      } else {
        V::store(out + v * kW, V::first(size - (first + v) * kW), y);
      }
    }
  }

  // Output rows [oy, oy + Rows) x vectors [first, first + Vecs).
  template <int Vecs, int Rows, int Stride>
  static void row_block(const Plane& p, int64_t oy, int64_t first) {
    const DepthwiseTaps& a = *p.args;
    const int64_t vecs = (a.out_w + kW - 1) / kW, left = first * kW * Stride - a.pad_w;
    Reg acc[Rows][Vecs];
    FXPRUNE_UNROLL
    for (int r = 0; r < Rows; ++r) {
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v) acc[r][v] = V::set1(p.bias);
    }
    for (int64_t i = 0; i < p.count; ++i) {
      const Tap& tap = p.taps[i];
      const Reg weight = V::set1(tap.weight);
      const int64_t dy = tap.id / a.kernel_w, dx = tap.id - dy * a.kernel_w;
      const uint32_t* masks = a.masks + dx * vecs + first;
      const int64_t column = left + dx * a.dilation_w, top = oy * a.stride_h - a.pad_h + dy * a.dilation_h;
      FXPRUNE_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const int64_t iy = top + r * a.stride_h;
        const float* row = iy >= 0 && iy < a.height ? p.x + iy * a.width : a.zeros;
        FXPRUNE_UNROLL
        for (int v = 0; v < Vecs; ++v) {
          const float* x = row + (column + v * kW * Stride);
          const Reg value = Stride == 1 ? V::load(x, V::bits(masks[v])) : V::load_even(x, masks[v]);
          acc[r][v] = V::fma(weight, value, acc[r][v]);
        }
      }
    }
    const Reg low = V::set1(p.clamp.low), high = V::set1(p.clamp.high);
    FXPRUNE_UNROLL
    for (int r = 0; r < Rows; ++r) {
      float* out = p.out + (oy + r) * a.out_w + first * kW;
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v) {
        const Reg y = V::min(high, V::max(low, acc[r][v]));
        if (v + 1 < Vecs) {
          V::store(out + v * kW, y);
        } else {
          V::store(out + v * kW, V::first(a.out_w - (first + v) * kW), y);
        }
      }
    }
  }

  template <int... I>
  static constexpr std::array<void (*)(const Plane&, int64_t), sizeof...(I)> flat_table(
      std::integer_sequence<int, I...>) {
    return {{&flat_block<I + 1>...}};
  }

  template <int Rows, int Stride, int... I>
  static constexpr std::array<void (*)(const Plane&, int64_t, int64_t), sizeof...(I)> row_table(
      std::integer_sequence<int, I...>) {
    return {{&row_block<I + 1, Rows, Stride>...}};
  }

  static void flat(const Plane& p) {
    static constexpr auto kKernels = flat_table(std::make_integer_sequence<int, kFlatVecs>());
    const int64_t vecs = (p.args->out_h * p.args->out_w + kW - 1) / kW;
    const int64_t blocks = (vecs + kFlatVecs - 1) / kFlatVecs;
    int64_t first = 0;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t here = vecs / blocks + (b < vecs % blocks);
      kKernels[here - 1](p, first);
      first += here;
    }
  }

  template <int Stride>
  static void rows(const Plane& p) {
    using Vecs = std::make_integer_sequence<int, kRowVecs>;
    static constexpr auto kSingle = row_table<1, Stride>(Vecs());
    static constexpr auto kBlock = row_table<kRows, Stride>(Vecs());
    const DepthwiseTaps& a = *p.args;
    const int64_t vecs = (a.out_w + kW - 1) / kW, blocks = (vecs + kRowVecs - 1) / kRowVecs;
    for (int64_t oy = 0; oy < a.out_h; oy += a.out_h < kRows ? 1 : kRows) {
      int64_t first = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t here = vecs / blocks + (b < vecs % blocks);
        // The last block of rows is moved up to be whole; rows it shares with its neighbour are computed twice, alike.
        if (a.out_h < kRows) {
          kSingle[here - 1](p, oy, first);
        } else {
          kBlock[here - 1](p, std::min(oy, a.out_h - kRows), first);
        }
        first += here;
      }
    }
  }

  static void plain(const Plane& p) {
    const DepthwiseTaps& a = *p.args;
    for (int64_t oy = 0; oy < a.out_h; ++oy) {
      float* out = p.out + oy * a.out_w;
      for (int64_t ox = 0; ox < a.out_w; ++ox) out[ox] = p.bias;
      for (int64_t i = 0; i < p.count; ++i) {
        const int64_t dy = p.taps[i].id / a.kernel_w, shift = p.taps[i].id % a.kernel_w * a.dilation_w - a.pad_w;
        const int64_t iy = oy * a.stride_h + dy * a.dilation_h - a.pad_h;
        if (iy < 0 || iy >= a.height) continue;
        int64_t left, right;
        valid_range(shift, a.stride_w, a.width, a.out_w, &left, &right);
        const float* x = p.x + iy * a.width + shift;
        for (int64_t ox = left; ox < right; ++ox) out[ox] += p.taps[i].weight * x[ox * a.stride_w];
      }
      for (int64_t ox = 0; ox < a.out_w; ++ox) {
        const float y = out[ox];
        out[ox] = y < p.clamp.low ? p.clamp.low : y > p.clamp.high ? p.clamp.high : y;
      }
    }
  }
};

// Planes [begin, end) of batch * channels. `taps`: room for one channel's taps.
template <class V>
void depthwise_taps(const DepthwiseTaps& a, int64_t begin, int64_t end, Tap* taps) {
  using D = Depthwise<V>;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t c = i % a.channels;
    typename D::Plane p;
    p.args = &a;
    p.x = a.x + i * a.height * a.width;
    p.out = a.out + i * a.out_h * a.out_w;
    p.taps = taps;
    p.count = D::list_taps(a, c, taps);
    p.bias = a.bias ? a.bias[c] : 0.0f;
    p.clamp = clamp_of(a.activation);
    if (a.flat(V::kWidth)) {
      D::flat(p);
    } else if (a.stride_w == 1) {
      D::template rows<1>(p);
    } else if (a.stride_w == 2) {
      D::template rows<2>(p);
    } else {
      D::plain(p);
    }
    if (!is_clamp(a.activation)) activate<V>(a.activation, p.out, a.out_h * a.out_w);
  }
}

}  // namespace fxprune
