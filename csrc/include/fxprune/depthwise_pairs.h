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
#include <cstring>
#include <type_traits>

#include "fxprune/depthwise_lists.h"
#include "fxprune/math.h"
#include "fxprune/unroll.h"

namespace fxprune {

// Two taps of one channel. Where there is no second one, the first stands for it, and `lanes` has
// no bit set.
struct TapPair {
  Bf16 weights[2];
  const TapSite* sites[2];
  uint32_t lanes;
};

template <class V>
struct DepthwisePairs {
  using Reg = typename V::Reg;
  using Pairs = typename V::Pairs;
  using Pair = TapPair;
  static constexpr int64_t kLine = 32, kHalf = kLine / 2;
  static constexpr int kLines = 8;  // whose sums are in registers

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
    const auto add = [&](int64_t tap, Bf16 held) {
      Pair& pair = pairs[count / 2];
      pair.weights[count % 2] = held;
      pair.sites[count % 2] = a.sites + tap;
      pair.lanes = ~0u;
      ++count;
    };
    for (KeptTaps tap(a, c); tap; ++tap) {
      float rest = weight[*tap];
      uint32_t bits;
      std::memcpy(&bits, &rest, sizeof bits);
      if ((bits & 0xFFFF) == 0) {  // bfloat16 holds it, the common case
        add(*tap, Bf16{static_cast<uint16_t>(bits >> 16)});
        continue;
      }
      for (int part = 0; part < kParts; ++part) {
        const Bf16 held = narrow(rest);
        add(*tap, held);
        rest -= widen(held);
        if (rest == 0.0f || !(rest - rest == 0.0f)) break;  // nothing is left, or infinity
      }
    }
    if (count % 2 != 0) {
      const Pair last = pairs[count / 2];
      pairs[count / 2] = {{last.weights[0], Bf16{0}}, {last.sites[0], last.sites[0]}, 0};
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
      const TapSite *one = pair->sites[0], *two = pair->sites[1];
      const Pairs weight = V::set1_pairs(pair->weights);
      const Bf16 *x = base + one->offset, *y = base + two->offset;
      const uint32_t *here = one->masks + first, *there = two->masks + first;
      FXPRUNE_UNROLL
      for (int v = 0; v < Lines; ++v) {
        const Pairs a = V::load_lanes(x + v * kLine, here[v]),
                    b = V::load_lanes(y + v * kLine, there[v] & pair->lanes);
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
      const TapSite *one = pair->sites[0], *two = pair->sites[1];
      const Pairs weight = V::set1_pairs(pair->weights);
      const uint32_t in_one = inside(a, top + one->row),
                     in_two = inside(a, top + two->row) & pair->lanes;
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

  // Rows [oy, oy + Rows) under a stride of 2 along them, whose lines are 16 outputs in their order.
  template <int Rows, int Lines>
  static void even_block(const Plane& p, int64_t oy, int64_t first, int64_t lines) {
    constexpr uint32_t kEven = 0x55555555u;
    const DepthwiseTapsBf16& a = *p.args;
    const int64_t top = oy * a.stride_h, pitch = a.stride_h * a.width;
    const Bf16* base = p.x + top * a.width + first * kLine;
    Reg sums[Rows][Lines];
    start(p, sums);
    for (const Pair *pair = p.pairs, *end = pair + p.count; pair != end; ++pair) {
      const TapSite *one = pair->sites[0], *two = pair->sites[1];
      const Pairs weight = V::set1_pairs(pair->weights);
      const Bf16 *x = base + one->offset, *y = base + two->offset - 1;
      const uint32_t *here = one->masks + first, *there = two->masks + first;
      int64_t at_one = top + one->row, at_two = top + two->row;
      FXPRUNE_UNROLL
      for (int r = 0; r < Rows; ++r) {
        const uint32_t in_one = inside(a, at_one) & kEven,
                       in_two = inside(a, at_two) & kEven & pair->lanes;
        FXPRUNE_UNROLL
        for (int v = 0; v < Lines; ++v) {
          const Pairs single = V::load_lanes(x + v * kLine, here[v] & in_one),
                      both = V::load_lanes(y + v * kLine, (there[v] & in_two) << 1, single);
          sums[r][v] = V::dot(weight, both, sums[r][v]);
        }
        x += pitch, y += pitch, at_one += a.stride_h, at_two += a.stride_h;
      }
    }
    if (!p.sums) end_sums<V>(a.activation, sums);
    FXPRUNE_UNROLL
    for (int r = 0; r < Rows; ++r) {
      FXPRUNE_UNROLL
      for (int v = 0; v < Lines; ++v) {
        const int64_t at = (first + v) * kHalf;
        if (p.sums) {
          V::store(p.sums + r * lines * kHalf + at, sums[r][v]);
        } else {
          V::store_bf16(p.out + (oy + r) * a.out_w + at, a.out_w - at, sums[r][v]);
        }
      }
    }
  }

  static uint32_t inside(const DepthwiseTapsBf16& a, int64_t y) {
    return y >= 0 && y < a.height ? ~0u : 0u;
  }

  // Calls block(how many, from) for parts of [begin, end), of at most `most`, as even as can be.
  template <int Most, class Block>
  static void in_blocks(int64_t begin, int64_t end, int64_t most, const Block& block) {
    const int64_t all = end - begin, blocks = (all + most - 1) / most;
    int64_t at = begin;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t here = all / blocks + (b < all % blocks);
      with_constant<Most>(here, [&](auto count) { block(count, at); });
      at += here;
    }
  }
  // f(count) with the count, of 1 to Most <= 8, as a constant.
  template <int Most, class F>
  static void with_constant(int64_t count, const F& f) {
    switch (count) {
      case 1:
        return f(constant<1>());
      case 2:
        return f(constant<std::min(2, Most)>());
      case 3:
        return f(constant<std::min(3, Most)>());
      case 4:
        return f(constant<std::min(4, Most)>());
      case 5:
        return f(constant<std::min(5, Most)>());
      case 6:
        return f(constant<std::min(6, Most)>());
      case 7:
        return f(constant<std::min(7, Most)>());
      default:
        return f(constant<Most>());
    }
  }
  template <int Count>
  static auto constant() {
    return std::integral_constant<int, Count>();
  }

  static void flat(const Plane& p, int64_t begin, int64_t end) {
    in_blocks<kLines>(begin, end, kLines,
                      [&](auto lines, int64_t at) { flat_block<lines()>(p, at); });
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
    const int64_t lines = (a.out_w + kLine - 1) / kLine;
    for (int64_t oy = begin; oy < end; ++oy) {
      in_blocks<kLines>(0, lines, kLines, [&](auto n, int64_t at) { row_block<n()>(p, oy, at); });
      if (!p.sums) continue;
      activate<V>(a.activation, p.sums, lines * kLine);
      Bf16* out = p.out + oy * a.out_w;
      for (int64_t at = 0; at < a.out_w; at += kLine)
        V::store_line(out + at, lanes(a.out_w - at), V::load(p.sums + at),
                      V::load(p.sums + at + kHalf));
    }
  }

  // Rows of few lines are taken together.
  static void even_rows(const Plane& p, int64_t begin, int64_t end) {
    const DepthwiseTapsBf16& a = *p.args;
    const int64_t lines = (a.out_w + kHalf - 1) / kHalf,
                  most = std::max<int64_t>(1, kLines / lines);
    in_blocks<kLines>(begin, end, most, [&](auto rows, int64_t oy) {
      in_blocks<kLines / rows()>(
          0, lines, kLines, [&](auto n, int64_t at) { even_block<rows(), n()>(p, oy, at, lines); });
      if (!p.sums) return;
      activate<V>(a.activation, p.sums, rows() * lines * kHalf);
      for (int64_t r = 0; r < rows(); ++r) {
        for (int64_t at = 0; at < a.out_w; at += kHalf)
          V::store_bf16(p.out + (oy + r) * a.out_w + at, a.out_w - at,
                        V::load(p.sums + r * lines * kHalf + at));
      }
    });
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
    const auto band = a.flat(D::kLine) ? &D::flat : a.stride_w == 2 ? &D::even_rows : &D::rows;
    band(plane, span.band_begin, span.band_end);
  }
}

}  // namespace fxprune
