// Vectors of one element per lane in the compiler's own vector types, so that one source serves
// every ISA; and the three element types that gradients have.
#pragma once

#include <cstdint>
#include <cstring>

namespace fxprune {

// One specialisation per width: the compilers do not take a size that depends on a template
// parameter.
template <int Width>
struct LaneTypes;

#define FXPRUNE_LANES(width)                                                                     \
  template <>                                                                                    \
  struct LaneTypes<width> {                                                                      \
    typedef float Float __attribute__((vector_size(4 * width)));                                 \
    typedef int32_t Int __attribute__((vector_size(4 * width))); /* comparisons give -1 and 0 */ \
    typedef uint32_t Word __attribute__((vector_size(4 * width)));                               \
    typedef uint16_t Half __attribute__((vector_size(2 * width)));                               \
  };
FXPRUNE_LANES(4)
FXPRUNE_LANES(8)
FXPRUNE_LANES(16)
#undef FXPRUNE_LANES

template <int Width>
struct Lanes {
  using Float = typename LaneTypes<Width>::Float;
  using Int = typename LaneTypes<Width>::Int;
  using Word = typename LaneTypes<Width>::Word;
  using Half = typename LaneTypes<Width>::Half;

  static Int splat(int32_t a) { return Int{} + a; }
  static Word iota() {
    Word v;
    for (int i = 0; i < Width; ++i) v[i] = i;
    return v;
  }
  // Lane i holds lane i ^ D of v.
  template <int D>
  static Int swap(Int v) {
#if defined(__clang__)
    Int swapped;
    for (int i = 0; i < Width; ++i) swapped[i] = v[i ^ D];
    return swapped;
#else
    return __builtin_shuffle(v, reinterpret_cast<Int>(iota()) ^ D);
#endif
  }
  static Float choose(Int mask, Float yes, Float no) {
    return reinterpret_cast<Float>((mask & reinterpret_cast<Int>(yes)) |
                                   (~mask & reinterpret_cast<Int>(no)));
  }
  template <class T>
  static T read(const void* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
};

// An element type: load() aligns its bits to the left of a word, so that they order as its values
// do; value() and bits() convert.
struct Float32 {
  using Storage = uint32_t;
  static constexpr int32_t kInfinite = 0x7f800000;  // the bits of Inf
  template <class L>
  static typename L::Word load(const Storage* p) {
    return L::template read<typename L::Word>(p);
  }
  template <class L>
  static void store(Storage* p, typename L::Word bits) {
    std::memcpy(p, &bits, sizeof bits);
  }
  template <class L>
  static typename L::Float value(typename L::Word bits) {
    return reinterpret_cast<typename L::Float>(bits);
  }
  template <class L>
  static typename L::Word bits(typename L::Float v) {
    return reinterpret_cast<typename L::Word>(v);
  }
};

struct Half {
  using Storage = uint16_t;
  template <class L>
  static typename L::Word load(const Storage* p) {
    const auto half = L::template read<typename L::Half>(p);
    return __builtin_convertvector(half, typename L::Word) << 16;
  }
  template <class L>
  static void store(Storage* p, typename L::Word bits) {
    const auto half = __builtin_convertvector(bits >> 16, typename L::Half);
    std::memcpy(p, &half, sizeof half);
  }
};

struct Bfloat16 : Half {
  static constexpr int32_t kInfinite = 0x7f800000;
  template <class L>
  static typename L::Float value(typename L::Word bits) {
    return reinterpret_cast<typename L::Float>(bits);
  }
  // To nearest, ties to even; NaN stays NaN.
  template <class L>
  static typename L::Word bits(typename L::Float v) {
    using Word = typename L::Word;
    const Word bits = reinterpret_cast<Word>(v);
    const Word rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Word nan = reinterpret_cast<Word>(v != v);
    return (nan & (bits | 0x400000u)) | (~nan & rounded);
  }
};

struct Float16 : Half {
  static constexpr int32_t kInfinite = 0x7c000000;
  // The exponent is rebased by a multiplication, which also normalises subnormal numbers.
  template <class L>
  static typename L::Float value(typename L::Word bits) {
    using Word = typename L::Word;
    using Float = typename L::Float;
    const Word magnitude = (bits >> 3) & 0x0fffe000u;
    const Float rebased = reinterpret_cast<Float>(magnitude) * 0x1p112f;
    const Word special = reinterpret_cast<Word>(magnitude >= 0x0f800000u) & 0x7f800000u;
    return reinterpret_cast<Float>(reinterpret_cast<Word>(rebased) | special |
                                   (bits & 0x80000000u));
  }
  // To nearest, ties to even: normal results by integer rounding, subnormal ones by an addition
  // whose last place is theirs. What is too large becomes Inf; NaN stays NaN.
  template <class L>
  static typename L::Word bits(typename L::Float v) {
    using Word = typename L::Word;
    using Float = typename L::Float;
    const Word bits = reinterpret_cast<Word>(v), size = bits & 0x7fffffffu;
    const Word normal = (size + 0xc8000fffu + ((size >> 13) & 1u)) >> 13;
    const Word tiny = reinterpret_cast<Word>(reinterpret_cast<Float>(size) + 0.5f) - 0x3f000000u;
    const Word small = reinterpret_cast<Word>(size < 0x38800000u);
    const Word large = reinterpret_cast<Word>(size >= 0x47800000u);
    const Word nan = reinterpret_cast<Word>(size > 0x7f800000u);
    Word word = (small & tiny) | (~small & normal);
    word = (large & 0x7c00u) | (~large & word) | (nan & 0x200u);
    return (word << 16) | (bits & 0x80000000u);
  }
};

}  // namespace fxprune
