// How large this machine's caches are.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <cstdint>

namespace fxprune {

constexpr int64_t kMeasuredL2 = 2 * 1024 * 1024;  // what sizes were measured beside

// Bytes of a core's L2.
inline int64_t l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  constexpr int64_t found = 0;
#endif
  return found > 0 ? found : kMeasuredL2;
}

// A size that is best beside 2 MB of L2, for this core's: in proportion down to half, below which
// more is lost by computing or reading twice than by going to L3.
inline int64_t of_l2(int64_t size) {
  return size * std::clamp(l2_bytes(), kMeasuredL2 / 2, kMeasuredL2) / kMeasuredL2;
}

// Parts that `bytes` of weights are cut in, each of which then stays in L2 while all that it
// multiplies passes by. 1 where L2 is large: there they are read whole for each block of pixels.
inline int64_t weight_parts(int64_t bytes) {
  return l2_bytes() > kMeasuredL2 / 4 ? 1 : std::max<int64_t>(1, 4 * bytes / l2_bytes());
}

}  // namespace fxprune
