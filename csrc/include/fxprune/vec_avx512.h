// AVX-512 vectors of 16 floats. Include only under a target pragma that enables avx512f, bw, vl and
// dq.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace fxprune {

struct Avx512 {
  static constexpr int kWidth = 16;
  // 24 of 32 registers hold sums; the rest hold one row of the other operands.
  static constexpr int kAccumulators = 24;
  static constexpr int kTileRows = 8;  // output features of a feature-major register tile
  static constexpr int kTileVecs = 3;  // pixel vectors of a feature-major register tile
  static constexpr int kRowVecs = 4;   // output-feature vectors of a row-major register tile

  using Reg = __m512;
  using Mask = __mmask16;

  static Reg zero() { return _mm512_setzero_ps(); }
  static Reg set1(float a) { return _mm512_set1_ps(a); }
  static Reg load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg load(const float* p, Mask m) { return _mm512_maskz_loadu_ps(m, p); }
  static void store(float* p, Reg a) { _mm512_storeu_ps(p, a); }
  static void store(float* p, Mask m, Reg a) { _mm512_mask_storeu_ps(p, m, a); }
  static Reg add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg sub(Reg a, Reg b) { return _mm512_sub_ps(a, b); }
  static Reg mul(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg div(Reg a, Reg b) { return _mm512_div_ps(a, b); }
  static Reg fma(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }  // a * b + c
  // a * p[lane] + c in the lanes of m, c elsewhere. One instruction that touches no memory of other
  // lanes; from intrinsics the compiler makes a masked load and a multiply-add, which compete for
  // the same two ports.
  static Reg fma_load(Reg a, const float* p, Mask m, Reg c) {
    typedef float Line __attribute__((vector_size(64), aligned(4), may_alias));
    __asm__("vfmadd231ps %3, %2, %0%{%1%}"
            : "+v"(c)
            : "Yk"(m), "v"(a), "m"(*reinterpret_cast<const Line*>(p)));
    return c;
  }
  // A NaN in the second operand is returned: clamp(x) = min(high, max(low, x)) keeps NaN.
  static Reg max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static Reg round(Reg a) {
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static Reg scale(Reg a, Reg n) { return _mm512_scalef_ps(a, n); }  // a * 2^n, n integral

  // How many of the first n <= kWidth integers are below `limit`.
  static int64_t below(const int32_t* p, int64_t n, int32_t limit) {
    const Mask mask = first(n);
    const __m512i entries = _mm512_maskz_loadu_epi32(mask, p);
    return __builtin_popcount(
        _mm512_mask_cmplt_epi32_mask(mask, entries, _mm512_set1_epi32(limit)));
  }
  // to[j][i] = from[i][j] of a kWidth x kWidth square: pairs of rows, pairs of pairs, then
  // quarters.
  static void transpose(const float* from, int64_t ld_from, float* to, int64_t ld_to) {
    Reg a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = load(from + i * ld_from);
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xEE);
      a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {  // quarter q of a[i + 4 r] is column i + 4 q of rows 4 r..
      const Reg p = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88),
                q = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88),
                r = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD),
                s = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xDD);
      store(to + i * ld_to, _mm512_shuffle_f32x4(p, q, 0x88));
      store(to + (i + 4) * ld_to, _mm512_shuffle_f32x4(r, s, 0x88));
      store(to + (i + 8) * ld_to, _mm512_shuffle_f32x4(p, q, 0xDD));
      store(to + (i + 12) * ld_to, _mm512_shuffle_f32x4(r, s, 0xDD));
    }
  }

  // p[0], p[1], ... in the lanes of b, in order; 0 elsewhere. Reads a whole vector.
  static Reg expand(const float* p, uint32_t b) {
    return _mm512_maskz_expand_ps(static_cast<Mask>(b), _mm512_loadu_ps(p));
  }
  // The same, reading nothing but what it returns.
  static Reg spread(const float* p, uint32_t b) {
    return _mm512_maskz_expandloadu_ps(static_cast<Mask>(b), p);
  }
  // Writes the lanes of b to p[0], p[1], ..., in order.
  static void compress(float* p, uint32_t b, Reg a) {
    if (b == 0xFFFFu) return store(p, a);
    store(p, first(__builtin_popcount(b)), _mm512_maskz_compress_ps(static_cast<Mask>(b), a));
  }
  static Mask bits(uint32_t b) { return static_cast<Mask>(b); }
  static Mask first(int64_t n) { return static_cast<Mask>(n >= 16 ? 0xFFFFu : (1u << n) - 1u); }
  // Lanes p[0], p[2], ..., p[30]; bit i of `b` permits the read of p[i].
  static Reg load_even(const float* p, uint32_t b) {
    const __m512i even =
        _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    return _mm512_permutex2var_ps(_mm512_maskz_loadu_ps(static_cast<Mask>(b), p), even,
                                  _mm512_maskz_loadu_ps(static_cast<Mask>(b >> 16), p + 16));
  }
};

}  // namespace fxprune
