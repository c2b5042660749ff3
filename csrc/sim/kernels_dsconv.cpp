// The fused depthwise and 1x1 convolution on the simulator, as a C function for the tests (see
// entry.h).
#include "fxprune/cuda/dsconv.cuh"
#include "sim/entry.h"

using namespace fxprune;
using namespace fxprune::gpu;

#pragma GCC visibility push(default)
extern "C" {

int64_t fxprune_sim_dsconv_bytes(int64_t channels, int kernel, int stride) {
  DepthwiseArgs a{};
  a.channels = channels, a.kernel_h = kernel, a.stride_h = stride;
  return dsconv_bytes(a);
}

// tensors: x, weight, taps, depthwise bias, image, index, tile_ptr, columns, bias, residual, out.
// sizes: batch, channels, height, width, out_h, out_w, kernel, stride, depthwise activation, n,
// kept, rows, granularity, tiles, activation.
const char* fxprune_sim_dsconv(int type, void* const* tensors, const int64_t* sizes) {
  return guarded([&] {
    DsconvArgs a{};
    DepthwiseArgs& d = a.depthwise;
    d.x = tensors[0], d.weight = tensors[1], d.bias = tensors[3];
    d.taps = static_cast<const uint64_t*>(tensors[2]);
    d.batch = sizes[0], d.channels = sizes[1];
    int* const fields[] = {&d.height, &d.width, &d.out_h, &d.out_w};
    for (int i = 0; i < 4; ++i) *fields[i] = static_cast<int>(sizes[2 + i]);
    d.kernel_h = d.kernel_w = static_cast<int>(sizes[6]);
    d.stride_h = d.stride_w = static_cast<int>(sizes[7]);
    d.pad_h = d.pad_w = d.kernel_h / 2;
    d.dilation_h = d.dilation_w = d.tap_words = 1;
    d.activation = static_cast<Activation>(sizes[8]);
    TileGemmArgs& g = a.gemm;
    g.image = tensors[4];
    const int32_t** const lists[] = {&g.index, &g.tile_ptr, &g.columns};
    for (int i = 0; i < 3; ++i) *lists[i] = static_cast<const int32_t*>(tensors[5 + i]);
    g.bias = tensors[8], g.residual = tensors[9], g.out = tensors[10];
    g.batch = d.batch, g.k = d.channels, g.m = int64_t{d.out_h} * d.out_w;
    int64_t* const counts[] = {&g.n, &g.kept, &g.rows, &g.granularity, &g.tiles};
    for (int i = 0; i < 5; ++i) *counts[i] = sizes[9 + i];
    g.activation = static_cast<Activation>(sizes[14]);
    Simulator simulator;
    if (type == 1) return dsconv<Half>(simulator, a);
    dsconv<Bfloat>(simulator, a);
  });
}

}  // extern "C"
#pragma GCC visibility pop
