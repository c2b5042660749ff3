// fxprune::nm_prune by magnitude on 16-bit elements, which are compared as they are: bits without
// the sign order as magnitudes do, NaN above Inf. Twice as many lanes as by way of 32 bits. In
// row-major memory a group of 2 or 4 is an integer whose rotations bring an element its neighbours:
// compilers take those of 16-bit lanes one by one.
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
    template <class Group>                                                               \
    using Groups __attribute__((vector_size(bytes))) = Group;                            \
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

  // A vector of groups of M elements, each group an integer; the lowest element is the first one.
  template <int M, class Group>
  Int keep_in_groups(Int key) const {
    using Groups = typename HalfTypes<2 * kWidth>::template Groups<Group>;
    const Groups groups = reinterpret_cast<Groups>(key);
    Int ahead{};  // minus how many of its group come before an element
    for (int r = 1; r < M; ++r) {
      const Groups other = groups << 16 * r | groups >> 16 * (M - r);
      const Groups lower = Groups{} + static_cast<Group>(~Group{0} << 16 * r);  // wins a tie
      ahead += reinterpret_cast<Int>(other) > key + reinterpret_cast<Int>(lower);
    }
    return ahead > L::splat(-static_cast<int>(a.n));
  }

  // Positions of consecutive groups.
  template <int M, class Group>
  void rows(const NmSpan& s) const {
    const int64_t channels = (s.last_group - s.first_group) * M;
    const bool whole = channels == a.channels;  // then they follow each other
    const int64_t positions = s.last_position - s.first_position;
    const int64_t runs = whole ? 1 : positions, length = whole ? channels * positions : channels;
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t row = s.sample * a.positions + s.first_position + run;
      const int64_t first = row * a.channels + a.first_channel(s.first_group);
      const uint16_t* from = static_cast<const uint16_t*>(a.x) + first;
      uint16_t* to = static_cast<uint16_t*>(a.out) + first;
      const auto prune = [&](int64_t i, int64_t count) {
        const Int x = load(from + i, count);
        store(to + i, count, x & keep_in_groups<M, Group>(x & 0x7fff));
      };
      int64_t i = 0;
      for (; i + kWidth <= length; i += kWidth) prune(i, kWidth);
      if (i < length) prune(i, length - i);
    }
  }

  // Prunes a span and returns true where it can.
  bool run(const NmSpan& s) const {
    if (a.element == Element::kFloat32 || a.function != NmFunction::kMagnitude) return false;
    if (a.conv_channels() % a.m != 0) return false;
    if (a.row_major) {
      if (a.m == 2) return rows<2, uint32_t>(s), true;
      if (a.m == 4) return rows<4, uint64_t>(s), true;
      return false;
    }
    if (a.m != 2 && a.m != 4 && a.m != 8) return false;
    if (a.m == 2) planes<2>(s);
    if (a.m == 4) planes<4>(s);
    if (a.m == 8) planes<8>(s);
    return true;
  }
};

}  // namespace fxprune
