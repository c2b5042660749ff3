// Runs a block of a network in bfloat16, 1x1 convolution -> depthwise -> 1x1 convolution
// (run_block.h).
#pragma once

#include <algorithm>
#include <cstdint>

#include "caches.h"
#include "run_bf16.h"
#include "run_block.h"

namespace fxprune {

// Bands that a block is cut in: as many as keep one's values in L2, a multiple of the threads. 0
// where too little is left of one beside the rows computed twice.
inline int64_t block_bands(const DepthwiseTapsBf16& d, int64_t pool) {
  const int64_t room = of_l2(256 * 1024);  // numbers of the depthwise result of a band
  constexpr int64_t kLeastLines = 6, kLeastRows = 7;
  const int64_t width = depthwise_width(d, d.x), length = band_length(d, width);
  const int64_t most = length / (d.flat(width) ? kLeastLines : kLeastRows);
  const int64_t fit = (d.channels * d.out_h * d.out_w + room - 1) / room;
  if (pool == 1) return std::max<int64_t>(1, std::min(fit, most));
  return std::min((fit + pool - 1) / pool, most / pool) * pool;
}

inline void run_block(const TileGemmBf16& expand, const DepthwiseTapsBf16& d,
                      const TileGemmBf16& project, int64_t bands, int64_t pool) {
  run_bands(d, &project, bands, pool,
            [&](const DepthwiseTapsBf16& taps, int64_t begin, int64_t end) {
              run_expand_band(expand, taps, {0, 0, 0, 0, expand.tiles}, begin, end);
            });
}

}  // namespace fxprune
