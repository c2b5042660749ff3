// The kernels of fxprune::tile_counts and fxprune::zero_outside: loops that compilers vectorise.
// Include only under a target pragma.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/mask_tiles.h"

namespace fxprune {

// Tiles [first, last).
template <class V>
void tile_counts(const TileCounts& s, int64_t first, int64_t last) {
  for (int64_t tile = first; tile < last; ++tile) {
    const int64_t *begin = s.begin(tile), *end = s.end(tile);
    int32_t* __restrict counts = s.counts + tile * s.k;
    std::fill(counts, counts + s.k, 0);
    for (const int64_t* feature = begin; feature < end; ++feature) {
      const uint8_t* row = s.mask + *feature * s.k;
      for (int64_t k = 0; k < s.k; ++k) counts[k] += row[k];
    }
  }
}

// Word: an unsigned integer as wide as a value. Its first bit is the sign, which zero may have.
template <class V, class Word>
bool zero_where_unset(const ZeroOutside& s, int64_t first, int64_t last) {
  constexpr int64_t kBlock = 4096;
  const auto* values = static_cast<const Word*>(s.values);
  for (int64_t start = first; start < last; start += kBlock) {
    const int64_t end = std::min(start + kBlock, last);
    Word wrong = 0;
    for (int64_t i = start; i < end; ++i) {
      const Word magnitude = static_cast<Word>(values[i] << 1);
      wrong |= s.mask[i] ? Word{0} : magnitude;
    }
    if (wrong != 0) return false;
  }
  return true;
}

// Values [first, last).
template <class V>
bool zero_outside(const ZeroOutside& s, int64_t first, int64_t last) {
  if (s.bytes == 2) return zero_where_unset<V, uint16_t>(s, first, last);
  if (s.bytes == 4) return zero_where_unset<V, uint32_t>(s, first, last);
  return zero_where_unset<V, uint64_t>(s, first, last);
}

}  // namespace fxprune
