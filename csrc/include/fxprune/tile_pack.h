// Gather of a dense weight (n, k) into packed tiles, its transpose, and the range check of index
// lists.
#pragma once

#include <cstdint>

#include "fxprune/tile_gemm.h"

namespace fxprune {

// Calls f(position in (n, k), position in values) for every kept weight, in packed order.
template <class F>
void for_each_kept(const TileShape& a, F f) {
  int64_t at = 0;
  for (int64_t t = 0; t < a.tiles; ++t) {
    const int32_t* columns = a.columns + t * a.granularity;
    const int64_t width = a.width(t);
    for (int64_t i = a.tile_ptr[t]; i < a.tile_ptr[t + 1]; ++i) {
      for (int64_t j = 0; j < width; ++j) f(columns[j] * a.k + a.index[i], at++);
    }
  }
}

// True when every v[i] lies in [0, limit). Branch-free, for the compiler to vectorise: it runs on
// every call.
template <class V>
bool all_below(const int32_t* v, int64_t count, int64_t limit) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t u = static_cast<uint32_t>(v[i]);  // a negative index is larger than any limit
    largest = u > largest ? u : largest;
  }
  return count == 0 || static_cast<int64_t>(largest) < limit;
}

// True when v increases strictly.
template <class V>
bool increasing(const int32_t* v, int64_t count) {
  int32_t bad = 0;
  for (int64_t i = 1; i < count; ++i) bad |= v[i] <= v[i - 1];
  return bad == 0;
}

}  // namespace fxprune
