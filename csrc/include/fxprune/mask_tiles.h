// What masks say of weights: how many features of a tile keep each K row, and whether values obey.
#pragma once

#include <cstdint>

#include "fxprune/tile_cut.h"

namespace fxprune {

// mask: rows of `k`, one a feature; counts: tiles x k
struct TileCounts : TileCut {
  const uint8_t* mask;
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
