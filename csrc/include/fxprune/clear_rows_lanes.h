// The kernel of fxprune::clear_pruned. Its rate is that of memory, which wide vectors reach because
// more cache lines are on their way at once. Include only under a target pragma.
#pragma once

#include <cstdint>
#include <cstring>

#include "fxprune/clear_rows.h"
#include "fxprune/lanes.h"

namespace fxprune {

constexpr int64_t kAhead = 1024;  // elements; what the processor fetches ahead by itself is less

template <class V, class T, class B>
void clear_span(T* x, const B* kept, int64_t width) {
  int64_t i = 0;
  if constexpr (sizeof(T) == 4 && sizeof(B) == 4) {
    using L = Lanes<V::kWidth>;
    for (; i + V::kWidth <= width; i += V::kWidth) {
      __builtin_prefetch(x + i + kAhead, 1);
      const auto v = L::template read<typename L::Int>(x + i);
      const auto both = v & L::template read<typename L::Int>(kept + i);
      std::memcpy(x + i, &both, sizeof both);
    }
  }
  for (; i < width; ++i) x[i] &= static_cast<T>(kept[i]);
}

template <class V, class T>
void clear_typed(const ClearRows& a, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    T* x = static_cast<T*>(a.values) + row * a.width;
    const int64_t begin = row / a.shared * a.width;
    if (a.bits == 1) {
      clear_span<V>(x, static_cast<const int8_t*>(a.kept) + begin, a.width);
    } else {
      clear_span<V>(x, static_cast<const int32_t*>(a.kept) + begin, a.width);
    }
  }
}

template <class V>
void clear_rows(const ClearRows& a, int64_t first, int64_t last) {
  if (a.element == 2) return clear_typed<V, int16_t>(a, first, last);
  if (a.element == 4) return clear_typed<V, int32_t>(a, first, last);
  clear_typed<V, int64_t>(a, first, last);
}

}  // namespace fxprune
