// How rows of a matrix (N, K), one a feature, are cut in tiles.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fxprune {

// columns: the `kept` features of all tiles; a tile is `granularity` consecutive ones of them
struct TileCut {
  const int64_t* columns;
  int64_t kept, granularity, k;

  int64_t tiles() const { return (kept + granularity - 1) / granularity; }
  const int64_t* begin(int64_t tile) const { return columns + tile * granularity; }
  const int64_t* end(int64_t tile) const {
    return columns + std::min((tile + 1) * granularity, kept);
  }
};

}  // namespace fxprune
