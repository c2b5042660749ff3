// AVX-512 vectors of 16 floats. Include only under a target pragma that enables avx512f, bw, vl and
// dq.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <limits>

#include "fxprune/bf16.h"
#include "fxprune/unroll.h"

namespace fxprune {

// Isa: the instruction set this is compiled for. It makes a type, and so the code, of each one's
// own, which the linker cannot mix up.
template <class Isa>
struct Avx512Vectors {
  static constexpr int kWidth = 16;
  // 24 of 32 registers hold sums; the rest hold one row of the other operands.
  static constexpr int kAccumulators = 24;
  static constexpr int kTileRows = 8;  // output features of a feature-major register tile
  static constexpr int kTileVecs = 3;  // pixel vectors of a feature-major register tile
  static constexpr int kRowVecs = 4;   // output-feature vectors of a row-major register tile
  static constexpr bool kMasksCost = false;

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
  // a / b within two units in the last place, for b >= 1 or infinite: a reciprocal and a step of
  // Newton's take a quarter of a division's time. Where b is infinite the step would be NaN.
  static Reg ratio(Reg a, Reg b) {
    const Reg r = _mm512_rcp14_ps(b), error = _mm512_fnmadd_ps(b, r, set1(1.0f));
    const Mask finite = _mm512_cmp_ps_mask(error, error, _CMP_ORD_Q);
    return mul(a, _mm512_mask_fmadd_ps(r, finite, error, r));
  }
  // a / 6, rounded as a division rounds it where a * 2^-26 is a normal number: 1/6 in two parts
  // (Brisebarre and Muller). Both are positive, so that infinities stay what they are.
  static Reg sixth(Reg a) {
    const Reg high = set1(0x1.555554p-3f), low = set1(0x1.555556p-27f);
    return fma(a, high, mul(a, low));
  }
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
  static float sum(Reg a) { return _mm512_reduce_add_ps(a); }
  // max that returns a NaN of either
  static Reg highest(Reg a, Reg b) {
    return _mm512_mask_mov_ps(max(a, b), _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), a);
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
    FXPRUNE_UNROLL
    for (int i = 0; i < 16; ++i) a[i] = load(from + i * ld_from);
    transpose(a, b);
    FXPRUNE_UNROLL
    for (int i = 0; i < 16; ++i) store(to + i * ld_to, b[i]);
  }
  // The same in registers; changes `a`.
  static void transpose(Reg* a, Reg* b) {
    FXPRUNE_UNROLL
    for (int i = 0; i < 16; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    FXPRUNE_UNROLL
    for (int i = 0; i < 16; i += 4) {
      a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xEE);
      a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xEE);
    }
    FXPRUNE_UNROLL
    for (int i = 0; i < 4; ++i) {  // quarter q of a[i + 4 r] is column i + 4 q of rows 4 r..
      const Reg p = _mm512_shuffle_f32x4(a[i], a[i + 4], 0x88),
                q = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88),
                r = _mm512_shuffle_f32x4(a[i], a[i + 4], 0xDD),
                s = _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xDD);
      b[i] = _mm512_shuffle_f32x4(p, q, 0x88);
      b[i + 4] = _mm512_shuffle_f32x4(r, s, 0x88);
      b[i + 8] = _mm512_shuffle_f32x4(p, q, 0xDD);
      b[i + 12] = _mm512_shuffle_f32x4(r, s, 0xDD);
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
  // Writes the numbers other than 0 among p[0 .. n), and `at + step * lane` of each; returns how
  // many. Both are whole vectors of memory.
  static int64_t nonzeros(const float* p, int64_t n, int64_t at, int64_t step, float* value,
                          int32_t* index) {
    const Reg x = load(p, first(n));
    const Mask mask = _mm512_cmp_ps_mask(x, zero(), _CMP_NEQ_UQ);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i steps = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(step)));
    const __m512i places = _mm512_add_epi32(steps, _mm512_set1_epi32(static_cast<int>(at)));
    _mm512_storeu_ps(value, _mm512_maskz_compress_ps(mask, x));
    _mm512_storeu_si512(index, _mm512_maskz_compress_epi32(mask, places));
    return __builtin_popcount(mask);
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

  // ---- bfloat16 ----

  static Reg load_bf16(const Bf16* p) { return widened(_mm256_loadu_si256(as_vector(p))); }
  // The first n lanes, 0 elsewhere.
  static Reg load_bf16(const Bf16* p, int64_t n) {
    return widened(_mm256_maskz_loadu_epi16(first(n), p));
  }
  static void store_bf16(Bf16* p, Reg a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), Isa::narrowed(a));
  }
  static void store_bf16(Bf16* p, int64_t n, Reg a) {
    _mm256_mask_storeu_epi16(p, first(n), Isa::narrowed(a));
  }
  // to[0 .. 32) = p[0 .. n), then zeros.
  static void copy_bf16(const Bf16* p, int64_t n, Bf16* to) {
    const __mmask32 mask = n >= 32 ? ~0u : (1u << n) - 1u;
    _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(mask, p));
  }
  // Interleaving two rows takes an instruction a half where their pixels stay in the lanes of 128
  // bits they are in: a line of sums holds pixels 0 to 3, 8 to 11, 16 to 19 and 24 to 27, then the
  // others. They are put in order when they are stored.
  static constexpr int64_t kFirstHalf = 4;
  static void interleave(const Bf16* low, const Bf16* high, Bf16* to) {
    interleave(_mm512_loadu_si512(low), _mm512_loadu_si512(high), to);
  }
  // The same, reading the first n pixels alone.
  static void interleave(const Bf16* low, const Bf16* high, int64_t n, Bf16* to) {
    const __mmask32 mask = n >= 32 ? ~0u : (1u << n) - 1u;
    interleave(_mm512_maskz_loadu_epi16(mask, low), _mm512_maskz_loadu_epi16(mask, high), to);
  }
  // to[i] = from[Stride i], 0 where the input lane's bit is not set, for the first n of a vector's
  // i.
  template <int Stride>
  static void plane_lanes(const Bf16* from, uint32_t mask, int64_t n, Bf16* to) {
    const __m256i lanes = Stride == 1 ? _mm256_maskz_loadu_epi16(static_cast<Mask>(mask), from)
                                      : _mm512_cvtepi32_epi16(_mm512_maskz_loadu_epi16(mask, from));
    _mm256_mask_storeu_epi16(to, first(n), lanes);
  }
  // Rows k of a panel from the 32 x 32 square from[ld r + k]: in the order whose sums are in order.
  static void panel_square(const Bf16* from, int64_t ld, Bf16* to) {
    transposed_bf16(from, ld, to,
                    _mm512_set_epi32(0x3E003C, 0x3A0038, 0x1E001C, 0x1A0018, 0x360034, 0x320030,
                                     0x160014, 0x120010, 0x2E002C, 0x2A0028, 0x0E000C, 0x0A0008,
                                     0x260024, 0x220020, 0x060004, 0x020000));
  }
  // to[32 k + r] = from[ld r + k] of a 32 x 32 square.
  static void transpose_bf16(const Bf16* from, int64_t ld, Bf16* to) {
    transposed_bf16(from, ld, to,
                    _mm512_set_epi32(0x3E003C, 0x3A0038, 0x360034, 0x320030, 0x2E002C, 0x2A0028,
                                     0x260024, 0x220020, 0x1E001C, 0x1A0018, 0x160014, 0x120010,
                                     0x0E000C, 0x0A0008, 0x060004, 0x020000));
  }
  // to[ld p + j] = lines[j][p] + bias[j], clamped, for p < count, j < features <= 32: rounded
  // first, then transposed as pairs of features.
  static void store_transposed(const float* const* lines, const float* bias, float low, float high,
                               float*, Bf16* to, int64_t ld, int64_t features, int64_t count) {
    const Reg least = set1(low), most = set1(high);
    const __mmask32 mask = features >= 32 ? ~0u : (1u << features) - 1u;
    constexpr float kInf = std::numeric_limits<float>::infinity();
    const bool clamped = low > -kInf || high < kInf;
    for (int64_t p = 0; p < count; p += 16) {
      Reg a[16], b[16];
      FXPRUNE_UNROLL
      for (int i = 0; i < 16; ++i) {
        const Reg even = add(load(lines[2 * i] + p), set1(bias[2 * i])),
                  odd = add(load(lines[2 * i + 1] + p), set1(bias[2 * i + 1]));
        a[i] = clamped ? Isa::joined(min(most, max(least, even)), min(most, max(least, odd)))
                       : Isa::joined(even, odd);
      }
      transpose(a, b);
      Bf16* at = to + p * ld;
      const int64_t rows = count - p;
      FXPRUNE_UNROLL
      for (int r = 0; r < 16; ++r) {
        if (r < rows) _mm512_mask_storeu_epi16(at + r * ld, mask, _mm512_castps_si512(b[r]));
      }
    }
  }
  // The same with residual[ld p + j] added in float. square: 512 floats of scratch.
  static void store_transposed(const float* const* lines, const float* bias, const Bf16* residual,
                               float low, float high, float* square, Bf16* to, int64_t ld,
                               int64_t features, int64_t count) {
    const Reg least = set1(low), most = set1(high);
    const __mmask32 mask = features >= 32 ? ~0u : (1u << features) - 1u;
    for (int64_t p = 0; p < count; p += 16) {
      for (int half = 0; half < 32; half += 16) {
        Reg a[16], b[16];
        FXPRUNE_UNROLL
        for (int i = 0; i < 16; ++i) a[i] = add(load(lines[half + i] + p), set1(bias[half + i]));
        transpose(a, b);
        FXPRUNE_UNROLL
        for (int i = 0; i < 16; ++i) store(square + 32 * i + half, b[i]);
      }
      for (int64_t r = 0; r < std::min<int64_t>(16, count - p); ++r) {
        const __m512i line = _mm512_maskz_loadu_epi16(mask, residual + (p + r) * ld);
        const Reg x = add(load(square + 32 * r), widened(_mm512_castsi512_si256(line))),
                  y = add(load(square + 32 * r + 16), widened(_mm512_extracti64x4_epi64(line, 1)));
        _mm512_mask_storeu_epi16(to + (p + r) * ld, mask,
                                 Isa::followed(min(most, max(least, x)), min(most, max(least, y))));
      }
    }
  }
  // Lines of 32 pixels. lanes: which of a plane's pixels they are (BlockLanes).
  using Line = __m512i;
  static Line load_line(const Bf16* p) { return _mm512_loadu_si512(p); }
  template <class Lanes>
  static Line load_line(const Bf16* plane, const Lanes& lanes) {
    Line line = _mm512_setzero_si512();
    for (int64_t i = 0; i < lanes.count; ++i)
      line = _mm512_mask_loadu_epi16(line, lanes.runs[i].lanes, plane + lanes.runs[i].shift);
    return line;
  }
  static void store_line(Bf16* p, Line line) { _mm512_storeu_si512(p, line); }
  template <class Lanes>
  static void store_line(Bf16* plane, const Lanes& lanes, Line line) {
    for (int64_t i = 0; i < lanes.count; ++i)
      _mm512_mask_storeu_epi16(plane + lanes.runs[i].shift, lanes.runs[i].lanes, line);
  }
  // end(from + bias), rounded; from: a line of sums, end: a function of a vector.
  template <class End>
  static Line line_of(const float* from, Reg bias, const End& end) {
    return line_of(end(add(load(from), bias)), end(add(load(from + 16), bias)));
  }
  // The lanes of a mask of a line, whose sums are in two registers.
  static void store_line(Bf16* to, uint32_t lanes, Reg a, Reg b) {
    _mm512_mask_storeu_epi16(to, lanes, line_of(a, b));
  }
  // sums += bias + pixels
  static void add_line(Line pixels, Reg bias, float* sums) {
    const __m512i as_sums = _mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0);
    const __m512i line = _mm512_permutexvar_epi64(as_sums, pixels);
    const Reg a = widened(_mm512_castsi512_si256(line)),
              b = widened(_mm512_extracti64x4_epi64(line, 1));
    store(sums, add(add(load(sums), bias), a));
    store(sums + 16, add(add(load(sums + 16), bias), b));
  }
  // Both rounded, one behind the other.
  static __m512i followed(Reg a, Reg b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrowed(a)), narrowed(b), 1);
  }
  // Both rounded, lane by lane beside each other.
  static Reg joined(Reg even, Reg odd) {
    const __m512i low = _mm512_cvtepu16_epi32(narrowed(even)),
                  high = _mm512_cvtepu16_epi32(narrowed(odd));
    return _mm512_castsi512_ps(_mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }

  // Both rounded, as the pairs of a vector's lanes.
  static void store_pairs(Bf16* to, Reg even, Reg odd) {
    store(reinterpret_cast<float*>(to), Isa::joined(even, odd));
  }

  // Pairs of bfloat16 as a dot product takes them. kDotsPairs: it is one instruction.
  static constexpr bool kDotsPairs = false;
  struct Pairs {
    Reg low, high;
  };
  static constexpr int kPairRows = 8, kPairVecs = 2;  // of a register tile of dot products
  static Pairs load_pairs(const Bf16* p) { return apart(_mm512_loadu_si512(p)); }
  static Pairs set1_pairs(const Bf16* p) {
    int32_t pair;
    __builtin_memcpy(&pair, p, sizeof pair);
    return apart(_mm512_set1_epi32(pair));
  }
  static Reg dot(Pairs a, Pairs b, Reg c) { return fma(a.high, b.high, fma(a.low, b.low, c)); }

  // Rounds to nearest even; NaN stays NaN.
  static __m256i narrowed(Reg a) {
    const __m512i bits = _mm512_castps_si512(a);
    const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), even);
    const Mask nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_blend_epi32(nan, _mm512_srli_epi32(sum, 16), _mm512_set1_epi32(0x7FC0)));
  }

 private:
  // Pairs of k as 32-bit numbers, then apart. even: where the columns of even k lie in two vectors
  // of pairs.
  static void transposed_bf16(const Bf16* from, int64_t ld, Bf16* to, __m512i even) {
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    alignas(64) float square[2][16 * 16];
    for (int half = 0; half < 2; ++half) {
      Reg a[16], b[16];
      FXPRUNE_UNROLL
      for (int i = 0; i < 16; ++i)
        a[i] = _mm512_castsi512_ps(_mm512_loadu_si512(from + (16 * half + i) * ld));
      transpose(a, b);
      FXPRUNE_UNROLL
      for (int i = 0; i < 16; ++i) store(square[half] + 16 * i, b[i]);
    }
    for (int p = 0; p < 16; ++p) {
      const __m512i a = _mm512_load_si512(square[0] + 16 * p),
                    b = _mm512_load_si512(square[1] + 16 * p);
      _mm512_storeu_si512(to + 64 * p, _mm512_permutex2var_epi16(a, even, b));
      _mm512_storeu_si512(to + 64 * p + 32, _mm512_permutex2var_epi16(a, odd, b));
    }
  }
  static __m512i line_of(Reg a, Reg b) {
    const __m512i in_order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
    return _mm512_permutexvar_epi64(in_order, Isa::followed(a, b));
  }
  static void interleave(__m512i a, __m512i b, Bf16* to) {
    _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, b));
    _mm512_storeu_si512(to + 32, _mm512_unpackhi_epi16(a, b));
  }
  static const __m256i* as_vector(const Bf16* p) { return reinterpret_cast<const __m256i*>(p); }
  static Reg widened(__m256i a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16));
  }
  static Pairs apart(__m512i pairs) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(~0xFFFF)))};
  }
};

struct Avx512 : Avx512Vectors<Avx512> {};

}  // namespace fxprune
