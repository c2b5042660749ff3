// The element types of the GPU kernels: float, Half and Bfloat, and how they become floats.
// Compiles for the GPU and, under the simulator, for the host.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define FXPRUNE_GPU __device__ __forceinline__
#define FXPRUNE_BOTH __host__ __device__ inline
#define FXPRUNE_PRAGMA(text) _Pragma(#text)
#define FXPRUNE_UNROLLED FXPRUNE_PRAGMA(unroll)
#define FXPRUNE_UNROLLED_BY(times) FXPRUNE_PRAGMA(unroll(times))
#else
#define FXPRUNE_GPU inline
#define FXPRUNE_BOTH inline
#define FXPRUNE_UNROLLED
#define FXPRUNE_UNROLLED_BY(times)
#endif

namespace fxprune::gpu {

// Shared memory that a block may have on every GPU from compute capability 8.0 on.
constexpr int64_t kLeastSharedBytes = 99 << 10;

struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

FXPRUNE_GPU uint64_t reverse_bits(uint64_t x) {
#ifdef __CUDACC__
  return __brevll(x);
#else
  uint64_t y = 0;
  for (int i = 0; i < 64; ++i) y |= (x >> i & 1) << (63 - i);
  return y;
#endif
}

// 16 bytes, the widest access.
struct alignas(16) Quad {
  uint32_t word[4];
};

FXPRUNE_GPU Quad quad_of(const uint16_t (&element)[8]) {
  Quad quad;
  FXPRUNE_UNROLLED
  for (int j = 0; j < 4; ++j) {
    quad.word[j] = element[2 * j] | static_cast<uint32_t>(element[2 * j + 1]) << 16;
  }
  return quad;
}

FXPRUNE_GPU float float_of_bits(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

FXPRUNE_GPU uint32_t bits_of_float(float value) {
#ifdef __CUDACC__
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
#endif
}

FXPRUNE_GPU float to_float(float x) {
  return x;
}

FXPRUNE_GPU float to_float(Bfloat x) {
  return float_of_bits(uint32_t{x.bits} << 16);
}

FXPRUNE_GPU float to_float(Half x) {
#ifdef __CUDACC__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  _Float16 half;
  std::memcpy(&half, &x.bits, 2);
  return static_cast<float>(half);
#endif
}

// The larger and the smaller of two, NaN if one of them is (fmaxf() and fminf() would drop it),
// each in one instruction: comparing and choosing becomes branches where many follow each other.
FXPRUNE_GPU float larger(float a, float b) {
#ifdef __CUDACC__
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return a < b ? b : a != a ? a : b != b ? b : a;
#endif
}

FXPRUNE_GPU float smaller(float a, float b) {
#ifdef __CUDACC__
  float c;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
#else
  return a > b ? b : a != a ? a : b != b ? b : a;
#endif
}

// Rounds to nearest, ties to even.
template <class T>
FXPRUNE_GPU T from_float(float x);

template <>
FXPRUNE_GPU float from_float<float>(float x) {
  return x;
}

template <>
FXPRUNE_GPU Bfloat from_float<Bfloat>(float x) {
  Bfloat y;
#ifdef __CUDACC__
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const uint32_t bits = bits_of_float(x);
  y.bits = x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
  return y;
}

template <>
FXPRUNE_GPU Half from_float<Half>(float x) {
  Half y;
#ifdef __CUDACC__
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
  const _Float16 half = static_cast<_Float16>(x);
  std::memcpy(&y.bits, &half, 2);
#endif
  return y;
}

// Conversion of 16 bytes of elements.
template <class T>
struct Pack;

template <>
struct Pack<float> {
  static constexpr int kCount = 4;
  static FXPRUNE_GPU void unpack(const Quad& from, float* to) {
    FXPRUNE_UNROLLED
    for (int i = 0; i < 4; ++i) to[i] = float_of_bits(from.word[i]);
  }
  static FXPRUNE_GPU Quad pack(const float* from) {
    Quad to;
    FXPRUNE_UNROLLED
    for (int i = 0; i < 4; ++i) to.word[i] = bits_of_float(from[i]);
    return to;
  }
};

template <class T>
struct Pack16 {
  static constexpr int kCount = 8;
  static FXPRUNE_GPU void unpack(const Quad& from, float* to) {
    FXPRUNE_UNROLLED
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = to_float(T{static_cast<uint16_t>(from.word[i] & 0xffff)});
      to[2 * i + 1] = to_float(T{static_cast<uint16_t>(from.word[i] >> 16)});
    }
  }
  static FXPRUNE_GPU Quad pack(const float* from) {
    Quad to;
    FXPRUNE_UNROLLED
    for (int i = 0; i < 4; ++i) {
      to.word[i] = from_float<T>(from[2 * i]).bits |
                   static_cast<uint32_t>(from_float<T>(from[2 * i + 1]).bits) << 16;
    }
    return to;
  }
};

template <>
struct Pack<Half> : Pack16<Half> {};
template <>
struct Pack<Bfloat> : Pack16<Bfloat> {};

enum class Element : int { kFloat, kHalf, kBfloat };

// Calls work(T()) with the type of an element.
template <class Work>
void with_element(Element element, Work work) {
  if (element == Element::kFloat) return work(float());
  if (element == Element::kHalf) return work(Half());
  work(Bfloat());
}

}  // namespace fxprune::gpu
