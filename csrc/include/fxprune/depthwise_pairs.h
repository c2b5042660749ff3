// Depthwise convolution over kept taps in bfloat16 by dot products of pairs: two taps at once.
//
//   stride 1: lines of two taps, 32 outputs each, interleaved     (x[p + t], x[p + u]) for outputs
//   p stride 2: the lines themselves, one shifted by a number and blended over the other, hold
//   pairs
//
// Planes are cut in lines of 32 outputs, of 16 under a stride of 2. A float weight that bfloat16
// cannot hold becomes the sum of up to three taps that it can.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "fxprune/depthwise_taps.h"
#include "fxprune/math.h"
#include "fxprune/unroll.h"

namespace fxprune {

// Two taps of one channel; the second may be absent.
template <class V>
struct TapPair {
  Bf16 weights[2];
  const TapSite *first, *second;
};

template <class V>
struct DepthwisePairs {
  using Reg = typename V::Reg;
  using Pairs = typename V::Pairs;
  using Pair = TapPair<V>;
  static constexpr int64_t kLine = 32, kHalf = kLine / 2;
  static constexpr int kLines = 4;  // lines whose sums are in registers

  struct Plane {
    const DepthwiseTapsBf16* args;
    const Bf16* x;
    Bf16* out;
    const Pair* pairs;
    int64_t count;
    float bias;
    Clamp clamp;
    float* sums;  // of a row or a plane, for activations that are no clamp; else null
  };

  static int64_t list_pairs(const DepthwiseTapsBf16& a, int64_t c, Pair* pairs) {
    constexpr int kParts = 3;
    const float* weight = a.weight + c * a.kernel();
    int64_t count = 0;
    for (int64_t word = 0; word < a.tap_words; ++word) {
      for (uint64_t bits = a.taps[c * a.tap_words + word]; bits; bits &= bits - 1) {
        const int64_t t = word * 64 + __builtin_ctzll(bits);
        float rest = weight[t];
        for (int part = 0; part < kParts; ++part) {
          const Bf16 held = narrow(rest);
          Pair& pair = pairs[count / 2];
          pair.weights[count % 2] = held;
          (count % 2 == 0 ? pair.first : pair.second) = a.sites + t;
          ++count;
          rest -= widen(held);
          if (rest == 0.0f || !(rest - rest == 0.0f)) break;  // nothing is left, or infinity
        }
      }
    }
    if (count % 2 != 0) {
      pairs[count / 2].weights[1] = Bf16{0};
      pairs[count / 2].second = nullptr;
    }
    return (count + 1) / 2;
  }

  static void finish(const Plane& p, Reg low, Reg high, int64_t lanes, float* sums, Bf16* out) {
    if (sums) {
      V::store(sums, low);
      V::store(sums + kHalf, high);
      return;
    }
    const Reg least = V::set1(p.clamp.low), most = V::set1(p.clamp.high);
    const uint32_t mask = lanes >= kLine ? ~0u : (1u << lanes) - 1u;
    V::store_line(out, mask, V::min(most, V::max(least, low)), V::min(most, V::max(least, high)));
  }

  // Lines [first, first + Lines) of a flat plane.
  template <int Lines>
  static void flat_block(const Plane& p, int64_t first) {
    const Bf16* base = p.x + first * kLine;
    Reg low[Lines], high[Lines];
    FXPRUNE_UNROLL
    for (int v = 0; v < Lines; ++v) low[v] = high[v] = V::set1(p.bias);
    for (const Pair *pair = p.pairs, *end = pair + p.count; pair != end; ++pair) {
      const Pairs weight = V::set1_pairs(pair->weights);
      const Bf16 *x = base + pair->first->offset,
                 *y = pair->second ? base + pair->second->offset : x;
      const uint32_t* here = pair->first->masks + first;
      const uint32_t* there = pair->second ? pair->second->masks + first : nullptr;
      FXPRUNE_UNROLL
      for (int v = 0; v < Lines; ++v) {
        const Pairs a = V::load_lanes(x + v * kLine, here[v]),
                    b = V::load_lanes(y + v * kLine, there ? there[v] : 0);
        low[v] = V::dot(weight, V::pairs_low(a, b), low[v]);
        high[v] = V::dot(weight, V::pairs_high(a, b), high[v]);
      }
    }
    const int64_t size = p.args->out_h * p.args->out_w;
    FXPRUNE_UNROLL
    for (int v = 0; v < Lines; ++v) {
      const int64_t at = (first + v) * kLine;
      finish(p, low[v], high[v], size - at, p.sums ? p.sums + at : nullptr, p.out + at);
    }
  }

  // Lines [first, first + Lines) of output row oy, under a stride of 1 along it.
  template <int Lines>
  static void row_block(const Plane& p, int64_t oy, int64_t first) {
    const DepthwiseTapsBf16& a = *p.args;
    const int64_t top = oy * a.stride_h;
    const Bf16* base = p.x + top * a.width + first * kLine;
    Reg low[Lines], high[Lines];
    FXPRUNE_UNROLL
    for (int v = 0; v < Lines; ++v) low[v] = high[v] = V::set1(p.bias);
    for (const Pair *pair = p.pairs, *end = pair + p.count; pair != end; ++pair) {
      const TapSite *one = pair->first, *two = pair->second ? pair->second : one;
      const Pairs weight = V::set1_pairs(pair->weights);
      const uint32_t in_one = inside(a, top + one->row),
                     in_two = pair->second ? inside(a, top + two->row) : 0;
      FXPRUNE_UNROLL
      for (int v = 0; v < Lines; ++v) {
        const Pairs x = V::load_lanes(base + one->offset + v * kLine,
                                      one->masks[first + v] & in_one),
                    y = V::load_lanes(base + two->offset + v * kLine,
                                      two->masks[first + v] & in_two);
        low[v] = V::dot(weight, V::pairs_low(x, y), low[v]);
        high[v] = V::dot(weight, V::pairs_high(x, y), high[v]);
      }
    }
    FXPRUNE_UNROLL
    for (int v = 0; v < Lines; ++v) {
      const int64_t at = (first + v) * kLine;
      finish(p, low[v], high[v], a.out_w - at, p.sums ? p.sums + at : nullptr,
             p.out + oy * a.out_w + at);
    }
  }

  // The same under a stride of 2, for lines of 16 outputs, in their order.
  template <int Lines>
  static void even_block(const Plane& p, int64_t oy, int64_t first) {
    constexpr uint32_t kEven = 0x55555555u;
    const DepthwiseTapsBf16& a = *p.args;
    const int64_t top = oy * a.stride_h;
    const Bf16* base = p.x + top * a.width + first * kLine;
    Reg sums[Lines];
    FXPRUNE_UNROLL
    for (int v = 0; v < Lines; ++v) sums[v] = V::set1(p.bias);
    for (const Pair *pair = p.pairs, *end = pair + p.count; pair != end; ++pair) {
      const TapSite *one = pair->first, *two = pair->second ? pair->second : one;
      const Pairs weight = V::set1_pairs(pair->weights);
      const uint32_t in_one = inside(a, top + one->row) & kEven,
                     in_two = pair->second ? inside(a, top + two->row) & kEven : 0;
      FXPRUNE_UNROLL
      for (int v = 0; v < Lines; ++v) {
        const Pairs x =
            V::load_lanes(base + one->offset + v * kLine, one->masks[first + v] & in_one);
        const uint32_t lanes = (two->masks[first + v] & in_two) << 1;
        const Pairs both = V::load_lanes(base + two->offset - 1 + v * kLine, lanes, x);
        sums[v] = V::dot(weight, both, sums[v]);
      }
    }
    const Reg least = V::set1(p.clamp.low), most = V::set1(p.clamp.high);
    FXPRUNE_UNROLL
    for (int v = 0; v < Lines; ++v) {
      const int64_t at = (first + v) * kHalf;
      if (p.sums) {
        V::store(p.sums + at, sums[v]);
      } else {
        V::store_bf16(p.out + oy * a.out_w + at, a.out_w - at,
                      V::min(most, V::max(least, sums[v])));
      }
    }
  }

  static uint32_t inside(const DepthwiseTapsBf16& a, int64_t y) {
    return y >= 0 && y < a.height ? ~0u : 0u;
  }

  template <class Block>
  static void in_blocks(int64_t begin, int64_t end, const Block& block) {
    int64_t at = begin;
    for (; at + kLines <= end; at += kLines) block(std::integral_constant<int, kLines>(), at);
    if (end - at >= 2) block(std::integral_constant<int, 2>(), at), at += 2;
    if (at < end) block(std::integral_constant<int, 1>(), at);
  }

  static void flat(const Plane& p, int64_t begin, int64_t end) {
    in_blocks(begin, end, [&](auto lines, int64_t at) { flat_block<lines()>(p, at); });
    if (!p.sums) return;
    const int64_t size = p.args->out_h * p.args->out_w;
    activate<V>(p.args->activation, p.sums + begin * kLine, (end - begin) * kLine);
    for (int64_t v = begin; v < end; ++v) {
      const int64_t at = v * kLine, left = size - at;
      V::store_line(p.out + at, left >= kLine ? ~0u : (1u << left) - 1u, V::load(p.sums + at),
                    V::load(p.sums + at + kHalf));
    }
  }

  static void rows(const Plane& p, int64_t begin, int64_t end) {
    const DepthwiseTapsBf16& a = *p.args;
    const bool even = a.stride_w == 2;
    const int64_t line = even ? kHalf : kLine, lines = (a.out_w + line - 1) / line;
    for (int64_t oy = begin; oy < end; ++oy) {
      if (even) {
        in_blocks(0, lines, [&](auto n, int64_t at) { even_block<n()>(p, oy, at); });
      } else {
        in_blocks(0, lines, [&](auto n, int64_t at) { row_block<n()>(p, oy, at); });
      }
      if (!p.sums) continue;
      activate<V>(a.activation, p.sums, lines * line);
      Bf16* out = p.out + oy * a.out_w;
      for (int64_t at = 0; at < a.out_w; at += line) {
        const int64_t left = a.out_w - at;
        if (even) {
          V::store_bf16(out + at, left, V::load(p.sums + at));
        } else {
          V::store_line(out + at, left >= kLine ? ~0u : (1u << left) - 1u, V::load(p.sums + at),
                        V::load(p.sums + at + kHalf));
        }
      }
    }
  }
};

// A span of planes under strides of at most 2 along rows. scratch: depthwise_bf16_scratch floats.
template <class V>
void depthwise_pairs(const DepthwiseTapsBf16& a, const PlaneSpan& span, float* scratch) {
  using D = DepthwisePairs<V>;
  const int64_t size = a.out_h * a.out_w;
  typename D::Pair* pairs = reinterpret_cast<typename D::Pair*>(scratch);
  float* sums = scratch + depthwise_lists(a);
  for (int64_t i = span.begin; i < span.end; ++i) {
    const int64_t c = i % a.channels, count = D::list_pairs(a, c, pairs);
    const typename D::Plane plane = {&a,
                                     a.x + i * (a.height * a.width + a.x_gap),
                                     a.out + i * (size + a.out_gap),
                                     pairs,
                                     count,
                                     a.bias ? a.bias[c] : 0.0f,
                                     clamp_of(a.activation),
                                     is_clamp(a.activation) ? nullptr : sums};
    if (a.flat(D::kLine)) {
      D::flat(plane, span.band_begin, span.band_end);
    } else {
      D::rows(plane, span.band_begin, span.band_end);
    }
  }
}

}  // namespace fxprune
