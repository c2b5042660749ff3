// The gradients of the tile-wise GEMM and convolution on the simulator, as C functions for the
// tests (see entry.h).
#include "fxprune/cuda/tile_grad_input.cuh"
#include "fxprune/cuda/tile_grad_weight.cuh"
#include "sim/entry.h"

using namespace fxprune;
using namespace fxprune::gpu;

namespace {

// tensors: grad, given (x, or values), image, index, tile_ptr, columns, out. sizes: batch, m, k, n,
// kept, rows, granularity, tiles, nnz, then under a window channels, groups, height, width, out_w,
// and kernel, stride, padding and dilation, each (h, w); else zeros.
TileGradientArgs gradient_args(void* const* tensors, const int64_t* sizes) {
  TileGradientArgs a{};
  TileGemmArgs& g = a.gemm;
  a.grad = tensors[0];
  g.x = g.values = tensors[1];
  g.image = tensors[2];
  const int32_t** const lists[] = {&g.index, &g.tile_ptr, &g.columns};
  for (int i = 0; i < 3; ++i) *lists[i] = static_cast<const int32_t*>(tensors[3 + i]);
  g.out = tensors[6];
  int64_t* const fields[] = {&g.batch, &g.m,    &g.k,           &g.n,
                             &g.kept,  &g.rows, &g.granularity, &g.tiles};
  for (int i = 0; i < 8; ++i) *fields[i] = sizes[i];
  a.nnz = sizes[8];
  TileWindow& w = g.window;
  w.channels = sizes[9], w.groups = sizes[10];
  int* const window[] = {&w.height,   &w.width, &w.out_w, &w.kernel_h,   &w.kernel_w,  &w.stride_h,
                         &w.stride_w, &w.pad_h, &w.pad_w, &w.dilation_h, &w.dilation_w};
  for (int i = 0; i < 11; ++i) *window[i] = static_cast<int>(sizes[11 + i]);
  return a;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// What room they need. Input: entries of pieces, counts. Weight: entries of the table, parts.
void fxprune_sim_tile_gradient_room(int type, bool of_input, const int64_t* sizes, int64_t* room) {
  void* const none[7] = {};
  const TileGradientArgs a = gradient_args(none, sizes);
  room[0] = of_input ? a.piece_count() * kPieceRows : 2 * a.gemm.tiles + 1;
  if (of_input) {
    room[1] = a.piece_count();
  } else {
    with_type(type, [&](auto t) { room[1] = weight_gradient_parts<decltype(t)>(a); });
  }
}

// pieces and counts, or table and partial (parts > 1).
const char* fxprune_sim_tile_gradient(int type, bool of_input, void* const* tensors, void* first,
                                      void* second, int64_t parts, const int64_t* sizes) {
  return guarded([&] {
    TileGradientArgs a = gradient_args(tensors, sizes);
    Simulator simulator;
    with_type(type, [&](auto t) {
      using T = decltype(t);
      if (of_input) {
        a.pieces = static_cast<uint32_t*>(first), a.counts = static_cast<int32_t*>(second);
        return tile_grad_input<T>(simulator, a);
      }
      a.table = static_cast<int32_t*>(first), a.partial = static_cast<float*>(second);
      a.parts = parts;
      tile_grad_weight<T>(simulator, a);
    });
  });
}

}  // extern "C"
#pragma GCC visibility pop
