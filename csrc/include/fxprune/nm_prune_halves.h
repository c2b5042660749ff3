// fxprune::nm_prune by magnitude on 16-bit elements, which are compared as they are: bits without
// the sign order as magnitudes do, NaN above Inf. Twice as many lanes as by way of 32 bits. For
// feature-major memory alone: compilers take the neighbours of 16-bit lanes one by one.
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
  };
FXPRUNE_HALVES(16)
FXPRUNE_HALVES(32)
FXPRUNE_HALVES(64)
#undef FXPRUNE_HALVES

// What nm_select.h needs of lanes, for 16-bit ones.
template <int Width>
struct HalfLanes {
  using Int = typename HalfTypes<2 * Width>::Int;

  static Int splat(int value) { return Int{} + static_cast<int16_t>(value); }
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
    if (a.row_major || a.conv_channels() % a.m != 0) return false;
    if (a.m != 2 && a.m != 4 && a.m != 8) return false;
    if (a.m == 2) planes<2>(s);
    if (a.m == 4) planes<4>(s);
    if (a.m == 8) planes<8>(s);
    return true;
  }
};

}  // namespace fxprune
