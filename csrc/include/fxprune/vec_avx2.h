// AVX2 + FMA vectors of 8 floats. Include only under a target pragma that enables avx2 and fma.
#pragma once

#include <immintrin.h>

#include <array>
#include <cstdint>

#include "fxprune/bf16_portable.h"
#include "fxprune/lists_portable.h"

namespace fxprune {

// For each set of lanes, a byte a lane: the numbers of its lanes in order (compress), or the rank
// of every lane among them (expand).
template <bool Compress>
constexpr std::array<uint64_t, 256> lane_orders() {
  std::array<uint64_t, 256> orders{};
  for (unsigned set = 0; set < 256; ++set) {
    unsigned rank = 0;
    for (unsigned lane = 0; lane < 8; ++lane) {
      if (!(set >> lane & 1)) continue;
      const unsigned at = Compress ? rank : lane, is = Compress ? lane : rank;
      orders[set] |= uint64_t{is} << 8 * at;
      ++rank;
    }
  }
  return orders;
}

struct Avx2 : PortableBf16<Avx2>, PortableLists<Avx2> {
  static constexpr int kWidth = 8;
  static constexpr int kAccumulators = 12;  // of 16 registers
  static constexpr int kTileRows = 4;
  static constexpr int kTileVecs = 3;
  static constexpr int kRowVecs = 2;
  static constexpr bool kMasksCost = true;  // a masked load is dearer than a plain one

  using Reg = __m256;
  using Mask = __m256i;

  static Reg zero() { return _mm256_setzero_ps(); }
  static Reg set1(float a) { return _mm256_set1_ps(a); }
  static Reg load(const float* p) { return _mm256_loadu_ps(p); }
  // Of which no compiler makes a call of memcpy, whatever the loop around does.
  static Reg load_opaque(const float* p) {
    Reg a = load(p);
    __asm__("" : "+x"(a));
    return a;
  }
  static Reg load(const float* p, Mask m) { return _mm256_maskload_ps(p, m); }
  static void store(float* p, Reg a) { _mm256_storeu_ps(p, a); }
  // m: of the first lanes, however many. A masked store is dozens of operations on many processors.
  static void store(float* p, Mask m, Reg a) {
    store_first(p, __builtin_popcount(_mm256_movemask_ps(_mm256_castsi256_ps(m))), a);
  }
  static Reg add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm256_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm256_div_ps(a, b); }
  static Reg ratio(Reg a, Reg b) { return div(a, b); }
  // As in vec_avx512.h.
  static Reg sixth(Reg a) {
    const Reg high = set1(0x1.555554p-3f), low = set1(0x1.555556p-27f);
    return fma(a, high, mul(a, low));
  }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg fma_load(Reg a, const float* p, Mask m, Reg c) { return fma(a, load(p, m), c); }
  static Reg max(Reg a, Reg b) { return _mm256_max_ps(a, b); }  // NaN in b is returned
  static Reg min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static float sum(Reg a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  // max that returns a NaN of either
  static Reg highest(Reg a, Reg b) {
    return _mm256_blendv_ps(max(a, b), a, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
  }
  // a * 2^n for integral n in [-126, 128]; 2^128 is infinity.
  static Reg scale(Reg a, Reg n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return mul(a, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }

  // How many of the first n <= kWidth integers are below `limit`.
  static int64_t below(const int32_t* p, int64_t n, int32_t limit) {
    const __m256i mask = first(n), entries = _mm256_maskload_epi32(p, mask);
    const __m256i hits =
        _mm256_and_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(limit), entries), mask);
    return __builtin_popcount(_mm256_movemask_ps(_mm256_castsi256_ps(hits)));
  }
  // to[j][i] = from[i][j] of a kWidth x kWidth square: pairs of rows, then of pairs, then of
  // halves.
  static void transpose(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
    Reg a[8], b[8];
    for (int i = 0; i < 8; ++i) a[i] = load(from + i * ld_from);
    for (int i = 0; i < 8; i += 2) {
      b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
      a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xEE);
      a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
      store(to + i * ld_to, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
      store(to + (i + 4) * ld_to, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
  }

  // p[0], p[1], ... in the lanes of b, in order; 0 elsewhere. Reads a whole vector.
  static Reg expand(const float* p, uint32_t b) { return spread(load(p), b); }
  // The same, reading nothing but what it returns.
  static Reg spread(const float* p, uint32_t b) {
    return b == 0xFFu ? load(p) : spread(load(p, first(__builtin_popcount(b))), b);
  }
  // Writes the lanes of b to p[0], p[1], ..., in order.
  static void compress(float* p, uint32_t b, Reg a) {
    if (b == 0xFFu) return store(p, a);
    static constexpr auto kOrders = lane_orders<true>();
    store_first(p, __builtin_popcount(b), _mm256_permutevar8x32_ps(a, lanes_of(kOrders[b])));
  }
  static Mask bits(uint32_t b) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(b)), lane), lane);
  }
  static Mask first(int64_t n) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n < 8 ? n : 8)), lane);
  }
  // a in the lanes of m, 0 elsewhere.
  static Reg keep(Reg a, Mask m) { return _mm256_and_ps(a, _mm256_castsi256_ps(m)); }
  static Reg load_even(const float* p, uint32_t b) {
    return evens(_mm256_maskload_ps(p, bits(b)), _mm256_maskload_ps(p + 8, bits(b >> 8)));
  }
  // The even and the odd lanes of two vectors that follow each other.
  static Reg evens(Reg low, Reg high) { return in_order(_mm256_shuffle_ps(low, high, 0x88)); }
  static Reg odds(Reg low, Reg high) { return in_order(_mm256_shuffle_ps(low, high, 0xDD)); }

  // ---- bfloat16: what PortableBf16 leaves ----

  using PortableBf16<Avx2>::load_bf16;
  using PortableBf16<Avx2>::store_bf16;
  static Reg load_bf16(const Bf16* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static void store_bf16(Bf16* p, Reg a) {  // as narrow()
    const __m256i bits = _mm256_castps_si256(a), one = _mm256_set1_epi32(1);
    const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), one);
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), even);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i half =
        _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7FC0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(half, half), 0xD8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }

  struct Pairs {
    Reg low, high;
  };
  static constexpr int kPairRows = 2, kPairVecs = 4;
  static Pairs load_pairs(const Bf16* p) {
    return apart(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Pairs set1_pairs(const Bf16* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return apart(_mm256_set1_epi32(pair));
  }
  static Reg dot(Pairs a, Pairs b, Reg c) { return fma(a.high, b.high, fma(a.low, b.low, c)); }

 private:
  static Reg in_order(Reg mixed) {
    return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xD8));
  }
  static Pairs apart(__m256i pairs) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(~0xFFFF)))};
  }
  static __m256i lanes_of(uint64_t order) {
    return _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(order)));
  }
  static Reg spread(Reg a, uint32_t b) {
    static constexpr auto kOrders = lane_orders<false>();
    const Reg placed = _mm256_permutevar8x32_ps(a, lanes_of(kOrders[b]));
    return _mm256_and_ps(placed, _mm256_castsi256_ps(bits(b)));
  }
  // Writes the first n <= kWidth lanes.
  static void store_first(float* p, int n, Reg a) {
    if (n == kWidth) return store(p, a);
    __m128 left = _mm256_castps256_ps128(a);
    if (n & 4) {
      _mm_storeu_ps(p, left);
      left = _mm256_extractf128_ps(a, 1);
      p += 4;
    }
    if (n & 2) {
      _mm_storel_pi(reinterpret_cast<__m64*>(p), left);
      left = _mm_movehl_ps(left, left);
      p += 2;
    }
    if (n & 1) _mm_store_ss(p, left);
  }
};

}  // namespace fxprune
