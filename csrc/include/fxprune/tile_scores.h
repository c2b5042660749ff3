// How much the rows of tiles matter: the root mean square of each K row over a tile's features.
//
//   values:  rows of `k` floats, one a feature
//   scores:  tiles x k
#pragma once

#include "fxprune/tile_cut.h"

namespace fxprune {

struct TileScores : TileCut {
  const float* values;
  float* scores;
};

}  // namespace fxprune
