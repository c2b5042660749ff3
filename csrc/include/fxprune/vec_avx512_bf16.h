// AVX-512 vectors with the dot products and roundings of AVX512-BF16. Include only under a target
// pragma that enables it beside avx512f, bw, vl and dq.
//
// Its instructions take denormal numbers as zero and give none.
#pragma once

#include "fxprune/vec_avx512.h"

namespace fxprune {

template <class Isa>
struct Avx512Bf16Vectors : Avx512Vectors<Isa> {
  using Reg = __m512;
  using Pairs = __m512i;
  static constexpr bool kDotsPairs = true;

  static Pairs load_pairs(const Bf16* p) { return _mm512_loadu_si512(p); }
  static Pairs set1_pairs(const Bf16* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static Reg dot(Pairs a, Pairs b, Reg c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  // Two lines of pixels, as the pairs of a line's sums.
  static Pairs pairs_low(Pairs a, Pairs b) { return _mm512_unpacklo_epi16(a, b); }
  static Pairs pairs_high(Pairs a, Pairs b) { return _mm512_unpackhi_epi16(a, b); }
  // p[i] in the lanes of a mask, 0 or `other` elsewhere.
  static Pairs load_lanes(const Bf16* p, uint32_t lanes) {
    return _mm512_maskz_loadu_epi16(lanes, p);
  }
  static Pairs load_lanes(const Bf16* p, uint32_t lanes, Pairs other) {
    return _mm512_mask_loadu_epi16(other, lanes, p);
  }
  static __m256i narrowed(Reg a) { return (__m256i)_mm512_cvtneps_pbh(a); }
  static __m512i followed(Reg a, Reg b) { return (__m512i)_mm512_cvtne2ps_pbh(b, a); }
  static Reg joined(Reg even, Reg odd) {
    const __m512i count = _mm512_set_epi32(
        0x1F000F, 0x1E000E, 0x1D000D, 0x1C000C, 0x1B000B, 0x1A000A, 0x190009, 0x180008, 0x170007,
        0x160006, 0x150005, 0x140004, 0x130003, 0x120002, 0x110001, 0x100000);
    const __m512i behind = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(count, behind));
  }
};

struct Avx512Bf16 : Avx512Bf16Vectors<Avx512Bf16> {};

}  // namespace fxprune
