// fxprune::nm_prune by magnitude on 16-bit elements, which are compared as they are: bits without
// the sign order as magnitudes do, NaN above Inf. Twice as many lanes as by way of 32 bits.
// Include only under a target pragma.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "fxprune/nm_prune.h"
#include "fxprune/nm_select.h"

namespace fxprune {

template <int Bytes>
struct HalfTypes;

#define FXPRUNE_HALVES(bytes)                                                            \
  template <>                                                                            \
  struct HalfTypes<bytes> {                                                              \
    typedef int16_t Int __attribute__((vector_size(bytes))); /* comparisons: -1 and 0 */ \
    typedef uint32_t Pair __attribute__((vector_size(bytes)));                           \
    typedef uint64_t Four __attribute__((vector_size(bytes)));                           \
  };
FXPRUNE_HALVES(16)
FXPRUNE_HALVES(32)
FXPRUNE_HALVES(64)
#undef FXPRUNE_HALVES

// What nm_select.h needs of lanes, for 16-bit ones.
template <int Width>
struct HalfLanes {
  using Int = typename HalfTypes<2 * Width>::Int;
  using Word = Int;
  using Pair = typename HalfTypes<2 * Width>::Pair;
  using Four = typename HalfTypes<2 * Width>::Four;

  static Int splat(int value) { return Int{} + static_cast<int16_t>(value); }
  static Word iota() {
    Int v;
    for (int i = 0; i < Width; ++i) v[i] = static_cast<int16_t>(i);
    return v;
  }
  // Lane i holds lane i ^ D of v: rotations of two and of four lanes, and of eight a shuffle.
  template <int D>
  static Int swap(Int v) {
    if constexpr (D & 1) {
      const Pair two = reinterpret_cast<Pair>(v);
      return swap<D & ~1>(reinterpret_cast<Int>(two << 16 | two >> 16));
    } else if constexpr (D & 2) {
      const Four four = reinterpret_cast<Four>(v);
      return swap<D & ~2>(reinterpret_cast<Int>(four << 32 | four >> 32));
    } else if constexpr (D & 4) {
      const Four four = reinterpret_cast<Four>(v);
      Four index;
      for (int i = 0; i < Width / 4; ++i) index[i] = i ^ 1;
#if defined(__clang__)
      Four swapped;
      for (int i = 0; i < Width / 4; ++i) swapped[i] = four[index[i]];
      return reinterpret_cast<Int>(swapped);
#else
      return reinterpret_cast<Int>(__builtin_shuffle(four, index));
#endif
    } else {
      return v;
    }
  }
};

template <class V>
struct NmHalves {
  static constexpr int kWidth = 2 * V::kWidth;
  using L = HalfLanes<kWidth>;
  using Int = typename L::Int;

  const NmPrune& a;

  static Int load(const uint16_t* p, int64_t count) {
    Int v{};
    std::memcpy(&v, p, count >= kWidth ? sizeof v : 2 * count);
    return v;
  }

  static void store(uint16_t* p, int64_t count, Int v) {
    std::memcpy(p, &v, count >= kWidth ? sizeof v : 2 * count);
  }

  // Groups of M channels that lie side by side.
  template <int M>
  void rows(const NmSpan& s) const {
    const int64_t c0 = a.first_channel(s.first_group);
    const int64_t channels = a.first_channel(s.last_group) - c0;
    const int n = static_cast<int>(a.n);
    for (int64_t p = s.first_position; p < s.last_position; ++p) {
      const int64_t at = (s.sample * a.positions + p) * a.channels + c0;
      const uint16_t* from = static_cast<const uint16_t*>(a.x) + at;
      uint16_t* to = static_cast<uint16_t*>(a.out) + at;
      for (int64_t c = 0; c < channels; c += kWidth) {
        const Int x = load(from + c, channels - c);
        const Int keep = keep_largest_lanes<L, M>(x & 0x7fff, n);
        store(to + c, channels - c, x & keep);
      }
    }
  }

  // Groups of M planes.
  template <int M>
  void planes(const NmSpan& s) const {
    for (int64_t g = s.first_group; g < s.last_group; ++g) {
      const int64_t plane = (s.sample * a.channels + a.first_channel(g)) * a.positions;
      const uint16_t* from = static_cast<const uint16_t*>(a.x) + plane;
      uint16_t* to = static_cast<uint16_t*>(a.out) + plane;
      const auto prune = [&](int64_t p, int64_t count) {
        Int x[M], key[M], keep[M];
        for (int i = 0; i < M; ++i) {
          x[i] = load(from + i * a.positions + p, count);
          key[i] = x[i] & 0x7fff;
        }
        keep_by_rank<L, M>(key, M, static_cast<int>(a.n), keep);
        for (int i = 0; i < M; ++i) store(to + i * a.positions + p, count, x[i] & keep[i]);
      };
      int64_t p = s.first_position;
      for (; p + kWidth <= s.last_position; p += kWidth) prune(p, kWidth);
      if (p == s.last_position) continue;
      const bool early = s.last_position - s.first_position >= kWidth;  // the last one starts early
      early ? prune(s.last_position - kWidth, kWidth) : prune(p, s.last_position - p);
    }
  }

  // Prunes a span and returns true where it can.
  bool run(const NmSpan& s) const {
    if (a.element == Element::kFloat32 || a.function != NmFunction::kMagnitude) return false;
    if (a.conv_channels() % a.m != 0 || (a.m != 2 && a.m != 4 && a.m != 8)) return false;
    if (a.m == 2) a.row_major ? rows<2>(s) : planes<2>(s);
    if (a.m == 4) a.row_major ? rows<4>(s) : planes<4>(s);
    if (a.m == 8) a.row_major ? rows<8>(s) : planes<8>(s);
    return true;
  }
};

}  // namespace fxprune
