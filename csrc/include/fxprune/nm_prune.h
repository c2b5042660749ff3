// n:m pruning of a gradient: of every m consecutive channels at one position, n stay.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/cuda/number.cuh"

namespace fxprune {

// A step of SplitMix64 (Steele, Lea, Flood 2014): random numbers are keyed by the state that a list
// of counters, and the number of the layer behind them, lead to from 0.
FXPRUNE_BOTH uint64_t add_counter(uint64_t state, uint64_t counter) {
  state = (state ^ counter) + 0x9e3779b97f4a7c15u;
  state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9u;
  state = (state ^ (state >> 27)) * 0x94d049bb133111ebu;
  return state ^ (state >> 31);
}

enum class Element : int32_t { kFloat32, kBfloat16, kFloat16 };

enum class NmFunction : int32_t {
  kRandom,
  kMagnitude,
  kRescaled,       // magnitude; then each (sample, channel) keeps its L1 norm
  kGroupRescaled,  // magnitude; then each group keeps its L1 norm
  kMvue            // unbiased, of least variance
};

constexpr int kMostOfGroup = 32;  // the largest m

struct NmPrune {
  const void* x;
  void* out;
  Element element;
  NmFunction function;
  int64_t samples, channels, positions;
  bool row_major;  // (samples, positions, channels) in memory, else (samples, channels, positions)
  int64_t conv_groups;  // groups of channels start anew in each
  int64_t n, m;
  uint32_t key[2];  // of the random numbers

  int64_t conv_channels() const { return channels / conv_groups; }
  int64_t groups_per_conv_group() const { return (conv_channels() + m - 1) / m; }
  int64_t groups() const { return conv_groups * groups_per_conv_group(); }
  // The first channel of a group; of groups(), the number of channels.
  int64_t first_channel(int64_t group) const {
    const int64_t per = groups_per_conv_group();
    return group / per * conv_channels() + group % per * m;
  }
  int64_t group_size(int64_t group) const {
    const int64_t left = conv_channels() - group % groups_per_conv_group() * m;
    return std::min(m, left);
  }
  // How many of a group of `size` channels stay: in the last one, n/m of them, rounded up.
  int64_t kept_of(int64_t size) const { return (n * size + m - 1) / m; }
  int64_t bytes() const { return element == Element::kFloat32 ? 4 : 2; }
};

// The part of one sample that a unit of work prunes. With kRescaled it holds every position.
struct NmSpan {
  int64_t sample, first_group, last_group, first_position, last_position;
};

// Floats of scratch that a span of `channels` channels needs on vectors of `width`.
inline int64_t nm_scratch(int64_t channels, int64_t width) {
  return channels * (3 * width + 1);
}

}  // namespace fxprune
