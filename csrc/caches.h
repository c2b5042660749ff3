// How large this machine's caches are.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace fxprune {

// A size that is best beside 2 MB of L2, for this core's: in proportion down to half, below which
// more is lost by computing or reading twice than by going to L3.
inline int64_t of_l2(int64_t size) {
  constexpr int64_t kMeasured = 2 * 1024 * 1024;
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  static const int64_t l2 = 0;
#endif
  return l2 <= 0 ? size : size * std::clamp(l2, kMeasured / 2, kMeasured) / kMeasured;
}

}  // namespace fxprune
