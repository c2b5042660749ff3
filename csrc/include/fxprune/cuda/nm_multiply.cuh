// A warp's product of 64 rows of kept elements, two of every four along k, and 32 columns of a
// dense panel, over the 64 k of a stage in shared memory.
//
//   kept    64 rows of 64 bytes, 32 elements each; in row r the 16-byte chunk c lies at chunk
//           c ^ r/2%4, free of bank conflicts for ldmatrix
//   places  4 blocks of 16 rows, 32 lanes of 4 bytes: what each lane hands to the instruction
//   dense   64 rows along k of 64 columns, as panel_offset() says
#pragma once

#include "fxprune/cuda/sparse.cuh"
#include "fxprune/cuda/tile_image.cuh"

namespace fxprune::gpu {

constexpr int kNmBlock = 64;  // k of a stage; packed rows are padded to it
constexpr int kKeptRowBytes = kNmBlock / 2 * 2, kPlaceBlockBytes = 32 * 4;

FXPRUNE_BOTH int kept_offset(int row, int chunk) {
  return row * kKeptRowBytes + (chunk ^ (row / 2 % 4)) * 16;
}

// The half of the stage from k 32*Half32 on, whose places lie in lanes of that number's pair.
template <class T, int Half32>
FXPRUNE_GPU void multiply_kept_half(const char* kept, const uint32_t (&places)[4],
                                    const char* dense, int column, float (&sums)[4][4][4]) {
  const int lane = thread() % 32;
  uint32_t b[4][4];
  FXPRUNE_UNROLLED
  for (int j = 0; j < 4; ++j) {
    load_matrices_transposed(b[j], dense + panel_offset(32 * Half32 + lane, column + 8 * j));
  }
  FXPRUNE_UNROLLED
  for (int i = 0; i < 4; ++i) {
    uint32_t x[4];
    load_matrices(x, kept + kept_offset(16 * i + lane % 16, 2 * Half32 + lane / 16));
    FXPRUNE_UNROLLED
    for (int j = 0; j < 4; ++j) {
      multiply_sparse_16x8x32<T, Half32>(sums[i][j], x, b[j], places[i]);
    }
  }
}

template <class T>
FXPRUNE_GPU void multiply_kept(const char* kept, const char* place_blocks, const char* dense,
                               int column, float (&sums)[4][4][4]) {
  uint32_t places[4];
  FXPRUNE_UNROLLED
  for (int i = 0; i < 4; ++i) {
    places[i] = load_shared<uint32_t>(place_blocks + i * kPlaceBlockBytes + thread() % 32 * 4);
  }
  multiply_kept_half<T, 0>(kept, places, dense, column, sums);
  multiply_kept_half<T, 1>(kept, places, dense, column, sums);
}

}  // namespace fxprune::gpu
