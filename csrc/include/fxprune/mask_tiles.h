// What masks say of weights: how many features of a tile keep each K row, and whether values obey.
#pragma once

#include <cstdint>

namespace fxprune {

// mask: rows of `k`, one a feature; columns: the features of tiles, `granularity` to each of them;
// counts: tiles x k
struct TileCounts {
  const uint8_t* mask;
  const int64_t* columns;
  int64_t kept, granularity, k;
  int32_t* counts;
};

// `count` floating-point values of `bytes` each, and which of them may differ from zero.
struct ZeroOutside {
  const void* values;
  int64_t bytes;
  const uint8_t* mask;
  int64_t count;
};

}  // namespace fxprune
