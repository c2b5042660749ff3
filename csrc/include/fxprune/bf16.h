// bfloat16: the upper half of a float.
//
// Vectors of V round and widen with V::load_bf16 and V::store_bf16; these are for single numbers.
// Rounding is to nearest, ties to even, and NaN stays NaN, as torch rounds.
#pragma once

#include <cstdint>
#include <cstring>

namespace fxprune {

struct Bf16 {
  uint16_t bits;
};

inline float widen(Bf16 a) {
  const uint32_t bits = static_cast<uint32_t>(a.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

inline Bf16 narrow(float a) {
  uint32_t bits;
  std::memcpy(&bits, &a, sizeof bits);
  if (a != a) return {0x7FC0};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

}  // namespace fxprune
