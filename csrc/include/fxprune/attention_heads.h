// Attention in bfloat16, head by head. Queries stay in the lanes of a vector, so that a softmax
// needs no sum across lanes, and both products are the pair products of tile_gemm_bf16.h:
//
//   scores[keys][32] = image of the keys, 32 depths to a block     times pairs of depths of q
//   sums[depth][32]  = image of v, 32 keys to a block              times pairs of rows of p
//
// Include only under a target pragma.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "fxprune/attention.h"
#include "fxprune/math.h"
#include "fxprune/pair_products.h"
#include "fxprune/tile_gemm_bf16.h"
#include "fxprune/unroll.h"

namespace fxprune {

template <class V>
struct AttentionHead {
  using Reg = typename V::Reg;
  static constexpr int kW = V::kWidth, kVecs = kPixels / V::kWidth;
  static constexpr int64_t kStrip = 16, kBlock = kStrip * kDeep;  // rows, numbers of a block

  const AttentionBf16& a;
  // Blocks of 32 depths and of 32 keys, the last one filled up with zeros.
  const int64_t deep = (a.depth + kDeep - 1) / kDeep, wide = (a.keys + kDeep - 1) / kDeep;
  // The room that scratch() counts.
  float *scores, *sums;
  Bf16 *keys, *values, *query, *shares;

  AttentionHead(const AttentionBf16& arguments, float* scratch) : a(arguments) {
    scores = scratch;
    sums = scores + wide * kDeep * kPixels;
    keys = reinterpret_cast<Bf16*>(sums + deep * kDeep * kPixels);
    values = keys + deep * wide * kDeep * kDeep;
    query = values + deep * wide * kDeep * kDeep;
    shares = query + deep * kDeep * kPixels;
  }

  // keys[strip of 16 keys][block of depths][16][32]
  void pack_keys(const Bf16* k) const {
    alignas(64) Bf16 lines[kDeep * kDeep], turned[kDeep * kDeep];
    const int64_t pitch = a.keys + a.k_gap;
    for (int64_t j = 0; j < wide; ++j) {
      for (int64_t d = 0; d < deep; ++d) {
        for (int64_t r = 0; r < kDeep; ++r) {
          const int64_t row = d * kDeep + r, lanes = row < a.depth ? a.keys - j * kDeep : 0;
          V::copy_bf16(k + (lanes ? row * pitch + j * kDeep : 0), std::min(lanes, kDeep),
                       lines + r * kDeep);
        }
        V::transpose_bf16(lines, kDeep, turned);
        for (int64_t half = 0; half < 2; ++half)
          std::copy_n(turned + half * kBlock, kBlock, keys + ((2 * j + half) * deep + d) * kBlock);
      }
    }
  }

  // values[strip of 16 depths][block of keys][16][32]
  void pack_values(const Bf16* v) const {
    const int64_t pitch = a.keys + a.v_gap;
    for (int64_t row = 0; row < deep * kDeep; ++row) {
      Bf16* to = values + row / kStrip * wide * kBlock + row % kStrip * kDeep;
      for (int64_t j = 0; j < wide; ++j, to += kBlock) {
        const int64_t lanes = row < a.depth ? a.keys - j * kDeep : 0;
        V::copy_bf16(v + (lanes ? row * pitch + j * kDeep : 0), std::min(lanes, kDeep), to);
      }
    }
  }

  // Pairs of depths of a block of queries, of which `lanes` exist.
  void pack_query(const Bf16* q, int64_t lanes) const {
    alignas(64) static constexpr Bf16 kNothing[kPixels] = {};
    const int64_t pitch = a.queries + a.q_gap;
    for (int64_t d = 0; d < deep * kDeep; d += 2) {
      const Bf16 *even = d < a.depth ? q + d * pitch : kNothing,
                 *odd = d + 1 < a.depth ? q + (d + 1) * pitch : kNothing;
      V::interleave(even, odd, lanes, query + d * kPixels);
    }
  }

  // image: strips of 16 rows, `depth` blocks of each.
  static void multiply(PairProducts<V>& products, const Bf16* image, int64_t rows, int64_t depth,
                       const Bf16* pairs, float* to) {
    const int64_t strip = depth * kBlock;
    for (int64_t r = 0; r < rows; r += 2 * kStrip, image += 2 * strip, to += 2 * kStrip * kPixels)
      products.run(image, strip, depth, kStrip, 2, pairs, 2, false, to);
  }

  // Adds the mask to scores that it scales.
  void add_mask(int64_t block, int64_t lanes) const {
    alignas(64) Bf16 line[kPixels];
    const Bf16* mask = a.mask + block * kPixels;
    const Reg scale = V::set1(a.scale);
    for (int64_t j = 0; j < a.keys; ++j, mask += a.queries + a.mask_gap) {
      V::copy_bf16(mask, lanes, line);
      float* row = scores + j * kPixels;
      for (int p = 0; p < kPixels; p += kW) V::store(row + p, V::mul(V::load(row + p), scale));
      V::add_line(V::load_line(line), V::zero(), row);
    }
  }

  // shares = exp(scale * scores - the largest one), rounded; factor = 1 / sum of them.
  void softmax(Reg* factor) const {
    constexpr float kLeast = -std::numeric_limits<float>::max();
    const Reg scale = V::set1(a.mask ? 1.0f : a.scale), floor = V::set1(kLeast);
    Reg most[kVecs], total[kVecs];
    FXPRUNE_UNROLL
    for (int v = 0; v < kVecs; ++v) most[v] = V::set1(-std::numeric_limits<float>::infinity());
    for (int64_t j = 0; j < a.keys; ++j) {
      FXPRUNE_UNROLL
      for (int v = 0; v < kVecs; ++v)
        most[v] = V::max(most[v], V::load(scores + j * kPixels + v * kW));
    }
    FXPRUNE_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      // 0 where the mask leaves nothing, else 1
      factor[v] = V::min(V::set1(1.0f), V::max(V::zero(), V::sub(most[v], floor)));
      most[v] = V::sub(V::zero(), V::mul(V::max(floor, most[v]), scale));
      total[v] = V::zero();
    }
    for (int64_t j = 0; j < wide * kDeep; j += 2) {
      const float* row = scores + j * kPixels;
      FXPRUNE_UNROLL
      for (int v = 0; v < kVecs; ++v) {
        Reg even = V::zero(), odd = V::zero();
        if (j < a.keys) {
          even = Math<V>::exp(V::fma(V::load(row + v * kW), scale, most[v]));
          total[v] = V::add(total[v], even);
        }
        if (j + 1 < a.keys) {
          odd = Math<V>::exp(V::fma(V::load(row + kPixels + v * kW), scale, most[v]));
          total[v] = V::add(total[v], odd);
        }
        V::store_pairs(shares + j * kPixels + 2 * v * kW, even, odd);
      }
    }
    FXPRUNE_UNROLL
    for (int v = 0; v < kVecs; ++v)
      factor[v] = V::div(factor[v], V::max(V::set1(1e-30f), total[v]));
  }

  void store(Bf16* out, int64_t lanes, const Reg* factor) const {
    const auto as_it_is = [](auto x) { return x; };
    BlockLanes places;
    places.add(0, 0, lanes);
    float* row = sums;
    for (int64_t e = 0; e < a.depth; ++e, row += kPixels, out += a.queries + a.out_gap) {
      FXPRUNE_UNROLL
      for (int v = 0; v < kVecs; ++v)
        V::store(row + v * kW, V::mul(V::load(row + v * kW), factor[v]));
      const auto line = V::line_of(row, V::zero(), as_it_is);
      lanes == kPixels ? V::store_line(out, line) : V::store_line(out, places, line);
    }
  }

  // Blocks [begin, end) of 32 queries of a head.
  void run(int64_t head, int64_t begin, int64_t end) const {
    const int64_t row = head * a.depth;
    pack_keys(a.k + row * (a.keys + a.k_gap));
    pack_values(a.v + row * (a.keys + a.v_gap));
    PairProducts<V> products;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kPixels, lanes = std::min(kPixels, a.queries - first);
      pack_query(a.q + row * (a.queries + a.q_gap) + first, lanes);
      multiply(products, keys, wide * kDeep, deep, query, scores);
      if (a.mask) add_mask(block, lanes);
      Reg factor[kVecs];
      softmax(factor);
      multiply(products, values, deep * kDeep, wide, shares, sums);
      store(a.out + row * (a.queries + a.out_gap) + first, lanes, factor);
    }
  }
};

// Floats of scratch of a head.
template <class V>
int64_t attention_scratch(const AttentionBf16& a) {
  const int64_t deep = (a.depth + kDeep - 1) / kDeep * kDeep,
                wide = (a.keys + kDeep - 1) / kDeep * kDeep;
  return (wide + deep) * kPixels + (2 * deep * wide + (deep + wide) * kPixels) / 2;
}

template <class V>
void attention_bf16(const AttentionBf16& a, int64_t head, int64_t begin, int64_t end,
                    float* scratch) {
  AttentionHead<V>(a, scratch).run(head, begin, end);
}

}  // namespace fxprune
