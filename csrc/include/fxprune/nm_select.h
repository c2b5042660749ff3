// Which channels of a group stay, for one position per lane. Include only under a target pragma.
#pragma once

#include <cstdint>

#include "fxprune/lanes.h"
#include "fxprune/nm_prune.h"

namespace fxprune {

// keep[i] = -1 for the n largest of m keys, ties to the lower index, else 0. A network of
// comparisons: each pair is compared once, and a key stays if fewer than n others precede it. M = m
// when it is known.
template <class L, int M>
inline void keep_by_rank(const typename L::Int* key, int m, int n, typename L::Int* keep) {
  using Int = typename L::Int;
  const int size = M ? M : m;
  Int rank[M ? M : kMostOfGroup];
#pragma GCC unroll 8
  for (int i = 0; i < size; ++i) rank[i] = L::splat(i);
#pragma GCC unroll 8
  for (int i = 0; i < size; ++i) {
#pragma GCC unroll 8
    for (int j = i + 1; j < size; ++j) {
      const Int later_wins = key[j] > key[i];
      rank[i] -= later_wins;
      rank[j] += later_wins;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < size; ++i) keep[i] = rank[i] < L::splat(n);
}

// The same for N of many keys, none of them negative: the N largest are held in order, each key
// sinks to its place among them, and what exceeds the least of them stays. m * N steps, not m * m.
template <class L, int N>
inline void keep_by_threshold(const typename L::Int* key, int m, typename L::Int* keep) {
  using Int = typename L::Int;
  Int top[N];
#pragma GCC unroll 16
  for (int j = 0; j < N; ++j) top[j] = L::splat(-1);
  for (int i = 0; i < m; ++i) {
    Int sinking = key[i];
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      const Int higher = sinking > top[j] ? sinking : top[j];
      sinking = sinking > top[j] ? top[j] : sinking;
      top[j] = higher;
    }
  }
  Int room = L::splat(N);  // for keys equal to the least
  for (int i = 0; i < m; ++i) room += key[i] > top[N - 1];
  for (int i = 0; i < m; ++i) {
    const Int tie = (key[i] == top[N - 1]) & (room > 0);
    keep[i] = (key[i] > top[N - 1]) | tie;
    room += tie;
  }
}

template <class L, int M>
inline void keep_largest(const typename L::Int* key, int m, int n, typename L::Int* keep) {
  if constexpr (M == 0) {
    if (m > 8 && n == 1) return keep_by_threshold<L, 1>(key, m, keep);
    if (m > 8 && n == 2) return keep_by_threshold<L, 2>(key, m, keep);
    if (m > 8 && n == 4) return keep_by_threshold<L, 4>(key, m, keep);
    if (m > 8 && n == 8) return keep_by_threshold<L, 8>(key, m, keep);
  }
  keep_by_rank<L, M>(key, m, n, keep);
}

// True when a lane of a comparison is.
template <class L>
inline bool any(typename L::Int mask) {
  bool found = false;
  for (unsigned lane = 0; lane < sizeof(mask) / 4; ++lane) found |= mask[lane] != 0;
  return found;
}

// The same for groups of M = 2, 4, 8 or 16 neighbouring lanes: every lane meets each other of its
// group. A lane gives way to an equal one before it, which a key lowered by one does.
template <class L, int M, int D = 1>
inline typename L::Int lanes_ahead(typename L::Int key) {
  using Int = typename L::Int;
  if constexpr (D < M) {
    const Int lane = reinterpret_cast<Int>(L::iota());
    const Int tie = (lane ^ D) < lane;
    const Int wins = L::template swap<D>(key) > key + tie;
    return lanes_ahead<L, M, D + 1>(key) - wins;
  } else {
    return Int{};
  }
}

template <class L, int M>
inline typename L::Int keep_largest_lanes(typename L::Int key, int n) {
  return lanes_ahead<L, M>(key) < L::splat(n);
}

// Finaliser of MurmurHash3 (Appleby): every input bit changes every output bit with probability
// 1/2.
template <class Word>
inline Word mix(Word x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// 32 random bits for one channel at each lane's position, the same in every layout and on every
// ISA.
template <class L>
inline typename L::Word draw(const NmPrune& a, int64_t first_position, int64_t channel) {
  using Word = typename L::Word;
  const uint32_t low = static_cast<uint32_t>(first_position);
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(first_position) >> 32);
  const Word at = L::iota() + low;
  const Word carried = high - reinterpret_cast<Word>(at < low);
  const Word place = mix((at ^ a.key[0]) + carried * 0x9e3779b1u);
  return mix((place ^ a.key[1]) + static_cast<uint32_t>(channel) * 0x85ebca77u);
}

// The same with one channel per lane, at one position.
template <class L>
inline typename L::Word draw_channels(const NmPrune& a, int64_t position, int64_t first_channel) {
  const uint32_t low = static_cast<uint32_t>(position);
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32);
  const uint32_t place = mix((low ^ a.key[0]) + high * 0x9e3779b1u);
  const auto channel = L::iota() + static_cast<uint32_t>(first_channel);
  return mix(channel * 0x85ebca77u + (place ^ a.key[1]));
}

// Minimum-variance unbiased pruning of m values to n: value i stays with probability
// p_i = min(1, c |x_i|), sum p = n, and becomes x_i / p_i. Water-filling finds the values of p = 1;
// systematic sampling with one random number draws the others, so that exactly n stay.
// Probabilities are multiples of 2^-24, so that the draw is free of rounding. Lanes of `plain` are
// left alone.
template <class L, int M>
inline void sample_unbiased(typename L::Float* x, int m_in, int n, typename L::Word random,
                            typename L::Int plain) {
  using Float = typename L::Float;
  using Int = typename L::Int;
  constexpr int32_t kOne = 1 << 24, kMargin = 256;  // more than all roundings of a group add up to
  const int m = M ? M : m_in;
  Float size[M ? M : kMostOfGroup], sum{};
  Int certain[M ? M : kMostOfGroup], left = L::splat(n);
#pragma GCC unroll 8
  for (int i = 0; i < m; ++i) {
    size[i] = reinterpret_cast<Float>(reinterpret_cast<Int>(x[i]) & 0x7fffffff);
    certain[i] = Int{};
  }
  for (int round = 0; round <= n; ++round) {
    sum = Float{};
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) sum += L::choose(certain[i], Float{}, size[i]);
    const Float share = __builtin_convertvector(left, Float);
    Int changed{};
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) {
      const Int now = ~certain[i] & (size[i] > 0.0f) & (size[i] * share >= sum);
      certain[i] |= now;
      changed |= now;
      left += now;
    }
    if (!any<L>(changed)) break;
  }
  Int start = reinterpret_cast<Int>(random >> 8);
  const Int low = start<kMargin, high = start> kOne - 1 - kMargin;
  start = (low & kMargin) | (high & (kOne - 1 - kMargin)) | (~(low | high) & start);
  const Float share = __builtin_convertvector(left, Float);
  Int reached{}, passed{};
#pragma GCC unroll 8
  for (int i = 0; i < m; ++i) {
    const Int open = ~certain[i] & (sum > 0.0f);
    const Float chance = L::choose(open, size[i] * share / sum, Float{});
    const Int part = __builtin_convertvector(chance * static_cast<float>(kOne), Int);
    reached += part;
    const Int points =
        (reached - start + (kOne - 1)) >> 24;  // of the sampling grid below `reached`
    const Int hit = points > passed;
    passed = points;
    const Float grown = x[i] * (static_cast<float>(kOne) / __builtin_convertvector(part, Float));
    const Float sampled = L::choose(certain[i], x[i], L::choose(hit, grown, Float{}));
    x[i] = L::choose(plain, x[i], sampled);
  }
}

}  // namespace fxprune
