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

#include "fxprune/depthwise_lists.h"
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
  static constexpr int kLines = 8;  // lines whose sums are in registers

  struct Plane {
    const DepthwiseTapsBf16* args;
    const Bf16* x;
    Bf16* out;
    const Pair* pairs;
    int64_t count;
    float bias;
    float* sums;  // of a row or a plane, for activations that do not end in registers; else null
  };

  static int64_t list_pairs(const DepthwiseTapsBf16& a, int64_t c, Pair* pairs) {
    constexpr int kParts = 3;
    const float* weight = a.weight + c * a.kernel();
    int64_t count = 0;
    for (KeptTaps tap(a, c); tap; ++tap) {
      float rest = weight[*tap];
      for (int part = 0; part < kParts; ++part) {
        const Bf16 held = narrow(rest);
        Pair& pair = pairs[count / 2];
        pair.weights[count % 2] = held;
        (count % 2 == 0 ? pair.first : pair.second) = a.sites + *tap;
        ++count;
        rest -= widen(held);
        if (rest == 0.0f || !(rest - rest == 0.0f)) break;  // nothing is left, or infinity
      }
    }
    if (count % 2 != 0) {
      pairs[count / 2].weights[1] = Bf16{0};
      pairs[count / 2].second = nullptr;
    }
    return (count + 1) / 2;
  }

  // sums[v]: of both halves of line v, whose first output is number `at`; `size`: outputs that
  // exist. to: where their sums go, or null.
  template <int Lines>
  static void finish(const Plane& p, Reg (&sums)[Lines][2], int64_t at, int64_t size, float* to,
                     Bf16* out) {
    if (to) {
      FXPRUNE_UNROLL
      for (int v = 0; v < Lines; ++v) {
        V::store(to + at + v * kLine, sums[v][0]);
        V::store(to + at + v * kLine + kHalf, sums[v][1]);
      }
      return;
    }
    end_sums<V>(p.args->activation, sums);
    FXPRUNE_UNROLL
    for (int v = 0; v < Lines; ++v, at += kLine)
      V::store_line(out + at, lanes(size - at), sums[v][0], sums[v][1]);
  }
  static uint32_t lanes(int64_t count) { return count >= kLine ? ~0u : (1u << count) - 1u; }

  // Lines [first, first + Lines) of a flat plane.
  template <int Lines>
  static void flat_block(const Plane& p, int64_t first) {
    const Bf16* base = p.x + first * kLine;
    Reg sums[Lines][2];
    start(p, sums);
    for (const Pair *pair = p.pairs, *end = pair + p.count; pair != end; ++pair) {
      const TapSite *one = pair->first, *two = pair->second ? pair->second : one;
      const Pairs weight = V::set1_pairs(pair->weights);
      const Bf16 *x = base + one->offset, *y = base + two->offset;
      const uint32_t *here = one->masks + first, *there = two->masks + first;
      const uint32_t present = pair->second ? ~0u : 0;
      FXPRUNE_UNROLL
      for (int v = 0; v < Lines; ++v) {
        const Pairs a = V::load_lanes(x + v * kLine, here[v]),
                    b = V::load_lanes(y + v * kLine, there[v] & present);
        sums[v][0] = V::dot(weight, V::pairs_low(a, b), sums[v][0]);
        sums[v][1] = V::dot(weight, V::pairs_high(a, b), sums[v][1]);
      }
    }
    finish(p, sums, first * kLine, p.args->out_h * p.args->out_w, p.sums, p.out);
  }
  template <int Lines, int Parts>
  static void start(const Plane& p, Reg (&sums)[Lines][Parts]) {
    FXPRUNE_UNROLL
    for (int v = 0; v < Lines; ++v) {
      FXPRUNE_UNROLL
      for (int i = 0; i < Parts; ++i) sums[v][i] = V::set1(p.bias);
    }
  }

  // Lines [first, first + Lines) of output row oy, under a stride of 1 along it.
  template <int Lines>
  static void row_block(const Plane& p, int64_t oy, int64_t first) {
    const DepthwiseTapsBf16& a = *p.args;
    const int64_t top = oy * a.stride_h;
    const Bf16* base = p.x + top * a.width + first * kLine;
    Reg sums[Lines][2];
    start(p, sums);
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
        sums[v][0] = V::dot(weight, V::pairs_low(x, y), sums[v][0]);
        sums[v][1] = V::dot(weight, V::pairs_high(x, y), sums[v][1]);
      }
    }
    finish(p, sums, first * kLine, a.out_w, p.sums, p.out + oy * a.out_w);
  }

  // The same under a stride of 2, for lines of 16 outputs, in their order.
  template <int Lines>
  static void even_block(const Plane& p, int64_t oy, int64_t first) {
    constexpr uint32_t kEven = 0x55555555u;
    const DepthwiseTapsBf16& a = *p.args;
    const int64_t top = oy * a.stride_h;
    const Bf16* base = p.x + top * a.width + first * kLine;
    Reg sums[Lines][1];
    start(p, sums);
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
        sums[v][0] = V::dot(weight, both, sums[v][0]);
      }
    }
    if (!p.sums) end_sums<V>(a.activation, sums);
    FXPRUNE_UNROLL
    for (int v = 0; v < Lines; ++v) {
      const int64_t at = (first + v) * kHalf;
      if (p.sums) {
        V::store(p.sums + at, sums[v][0]);
      } else {
        V::store_bf16(p.out + oy * a.out_w + at, a.out_w - at, sums[v][0]);
      }
    }
  }

  static uint32_t inside(const DepthwiseTapsBf16& a, int64_t y) {
    return y >= 0 && y < a.height ? ~0u : 0u;
  }

  // Blocks of at most kLines lines, as even as can be.
  template <class Block>
  static void in_blocks(int64_t begin, int64_t end, const Block& block) {
    const int64_t lines = end - begin, blocks = (lines + kLines - 1) / kLines;
    int64_t at = begin;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t here = lines / blocks + (b < lines % blocks);
      with_constant<kLines>(here, [&](auto count) { block(count, at); });
      at += here;
    }
  }
  template <int Most, class F>
  static void with_constant(int64_t count, const F& f) {
    if constexpr (Most > 1) {
      if (count < Most) return with_constant<Most - 1>(count, f);
    }
    f(std::integral_constant<int, Most>());
  }

  static void flat(const Plane& p, int64_t begin, int64_t end) {
    in_blocks(begin, end, [&](auto lines, int64_t at) { flat_block<lines()>(p, at); });
    if (!p.sums) return;
    const int64_t size = p.args->out_h * p.args->out_w;
    activate<V>(p.args->activation, p.sums + begin * kLine, (end - begin) * kLine);
    for (int64_t v = begin; v < end; ++v) {
      const int64_t at = v * kLine;
      V::store_line(p.out + at, lanes(size - at), V::load(p.sums + at),
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
          V::store_line(out + at, lanes(left), V::load(p.sums + at), V::load(p.sums + at + kHalf));
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
                                     ends_in_registers(a.activation) ? nullptr : sums};
    if (a.flat(D::kLine)) {
      D::flat(plane, span.band_begin, span.band_end);
    } else {
      D::rows(plane, span.band_begin, span.band_end);
    }
  }
}

}  // namespace fxprune
