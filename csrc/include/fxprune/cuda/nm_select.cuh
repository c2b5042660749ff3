// Which members of a group of up to M stay, by their keys, and the random numbers of n:m pruning:
// the scalar twins of fxprune/nm_select.h. Keys are not negative; absent members have the key -1.
#pragma once

#include <cmath>

#include "fxprune/cuda/ptx.cuh"

namespace fxprune::gpu {

// Finaliser of MurmurHash3 (Appleby).
FXPRUNE_GPU uint32_t mix_bits(uint32_t x) {
  x ^= x >> 16;
  x *= 0x85ebca6bu;
  x ^= x >> 13;
  x *= 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// What the random numbers of all channels at one position start from.
FXPRUNE_GPU uint32_t draw_place(const uint32_t (&key)[2], int64_t position) {
  const uint32_t low = static_cast<uint32_t>(position);
  const uint32_t high = static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32);
  return mix_bits((low ^ key[0]) + high * 0x9e3779b1u) ^ key[1];
}
FXPRUNE_GPU uint32_t draw_channel(uint32_t place, int64_t channel) {
  return mix_bits(place + static_cast<uint32_t>(channel) * 0x85ebca77u);
}

// Batcher's odd-even merge sort, largest first, unrolled: no key is ever addressed by a variable.
template <int M, int P = 1, int K = P>
FXPRUNE_GPU void sort_falling(int32_t (&key)[M]) {
  FXPRUNE_UNROLLED
  for (int i = 0; i + K < M; ++i) {
    if (i >= K % P && (i - K % P) / K % 2 == 0 && i / (2 * P) == (i + K) / (2 * P)) {
      const int32_t first = key[i], second = key[i + K];
      key[i] = first > second ? first : second;
      key[i + K] = first > second ? second : first;
    }
  }
  if constexpr (K > 1) {
    sort_falling<M, P, K / 2>(key);
  } else if constexpr (2 * P < M) {
    sort_falling<M, 2 * P, 2 * P>(key);
  }
}

// Bit i is set when key[i] is among the n largest, ties to the lower index. Small groups compare
// every pair, M (M - 1) / 2 of them; large ones sort a copy, and what equals the n-th key stays
// while there is room.
template <int M>
FXPRUNE_GPU uint32_t keep_largest(const int32_t (&key)[M], int n) {
  uint32_t keep = 0;
  if constexpr (M <= 8) {
    int before[M];
    FXPRUNE_UNROLLED
    for (int i = 0; i < M; ++i) before[i] = i;
    FXPRUNE_UNROLLED
    for (int i = 0; i < M; ++i) {
      FXPRUNE_UNROLLED
      for (int j = i + 1; j < M; ++j) {
        const int later_wins = key[j] > key[i];
        before[i] += later_wins;
        before[j] -= later_wins;
      }
    }
    FXPRUNE_UNROLLED
    for (int i = 0; i < M; ++i) keep |= static_cast<uint32_t>(before[i] < n) << i;
  } else {
    int32_t sorted[M];
    FXPRUNE_UNROLLED
    for (int i = 0; i < M; ++i) sorted[i] = key[i];
    sort_falling(sorted);
    int32_t last = 0;  // the n-th: the largest of those from there on
    FXPRUNE_UNROLLED
    for (int i = 0; i < M; ++i) {
      const int32_t candidate = i >= n - 1 ? sorted[i] : 0;
      last = last > candidate ? last : candidate;
    }
    int room = n;
    FXPRUNE_UNROLLED
    for (int i = 0; i < M; ++i) room -= key[i] > last;
    FXPRUNE_UNROLLED
    for (int i = 0; i < M; ++i) {
      const bool ties = key[i] == last && room > 0;
      room -= ties;
      keep |= static_cast<uint32_t>(key[i] > last || ties) << i;
    }
  }
  return keep;
}

// Minimum-variance unbiased pruning, in place: member i stays with probability p_i = min(1, c
// |x_i|), sum p = n, and becomes x_i / p_i. See sample_unbiased() in fxprune/nm_select.h, whose
// every rounding this repeats. Absent members are 0.
template <int M>
FXPRUNE_GPU void sample_unbiased(float (&x)[M], int n, uint32_t random) {
  constexpr int32_t kOne = 1 << 24, kMargin = 256;
  uint32_t certain = 0;
  int left = n;
  float sum = 0.0f;
  for (int round = 0; round <= n; ++round) {
    sum = 0.0f;
    FXPRUNE_UNROLLED
    for (int i = 0; i < M; ++i) sum += certain >> i & 1 ? 0.0f : fabsf(x[i]);
    const float share = static_cast<float>(left);
    uint32_t now = 0;
    FXPRUNE_UNROLLED
    for (int i = 0; i < M; ++i) {
      const float size = fabsf(x[i]);
      now |= static_cast<uint32_t>(size > 0.0f && size * share >= sum) << i;
    }
    now &= ~certain;
    if (now == 0) break;
    certain |= now;
    FXPRUNE_UNROLLED
    for (int i = 0; i < M; ++i) left -= static_cast<int>(now >> i & 1);
  }
  int32_t start = static_cast<int32_t>(random >> 8);
  start = start < kMargin ? kMargin : start > kOne - 1 - kMargin ? kOne - 1 - kMargin : start;
  const float share = static_cast<float>(left);
  int32_t reached = 0, passed = 0;
  FXPRUNE_UNROLLED
  for (int i = 0; i < M; ++i) {
    const bool stays = certain >> i & 1;
    const float chance = !stays && sum > 0.0f ? fabsf(x[i]) * share / sum : 0.0f;
    const int32_t part = static_cast<int32_t>(chance * static_cast<float>(kOne));
    reached += part;
    const int32_t points = (reached - start + (kOne - 1)) >> 24;
    const bool hit = points > passed;
    passed = points;
    const float grown = hit ? x[i] * (static_cast<float>(kOne) / static_cast<float>(part)) : 0.0f;
    x[i] = stays ? x[i] : grown;
  }
}

}  // namespace fxprune::gpu
