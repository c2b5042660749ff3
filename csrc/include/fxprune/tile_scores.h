// How much the rows of tiles matter: the root mean square of each K row over a tile's features.
//
//   values:  rows of `k` floats, one a feature
//   columns: the kept features; a tile is `granularity` consecutive ones of them
//   scores:  tiles x k
#pragma once

#include <cstdint>

namespace fxprune {

struct TileScores {
  const float* values;
  const int64_t* columns;
  int64_t kept, granularity, k;
  float* scores;
};

}  // namespace fxprune
