// The GPU operators on the simulator, as C functions for the tests (see entry.h).
#include "fxprune/cuda/depthwise_gradients.cuh"
#include "fxprune/cuda/depthwise_pool.cuh"
#include "fxprune/cuda/tile_gemm.cuh"
#include "fxprune/cuda/tile_pack.cuh"
#include "sim/entry.h"

using namespace fxprune;
using namespace fxprune::gpu;

namespace {

DepthwiseArgs depthwise_args(const int64_t* g) {
  DepthwiseArgs a{};
  a.batch = g[0], a.channels = g[1];
  int* const fields[] = {&a.height,   &a.width,      &a.out_h,     &a.out_w,    &a.tap_words,
                         &a.kernel_h, &a.kernel_w,   &a.stride_h,  &a.stride_w, &a.pad_h,
                         &a.pad_w,    &a.dilation_h, &a.dilation_w};
  for (int i = 0; i < 13; ++i) *fields[i] = static_cast<int>(g[2 + i]);
  a.activation = static_cast<Activation>(g[15]);
  return a;
}

TileGemmArgs tile_args(void* const* tensors, const int64_t* sizes) {
  TileGemmArgs a{};
  const void** const pointers[] = {&a.x, &a.values, &a.image};
  for (int i = 0; i < 3; ++i) *pointers[i] = tensors[i];
  const int32_t** const lists[] = {&a.index, &a.tile_ptr, &a.columns};
  for (int i = 0; i < 3; ++i) *lists[i] = static_cast<const int32_t*>(tensors[3 + i]);
  a.bias = tensors[6], a.residual = tensors[7], a.gate = tensors[8], a.out = tensors[9];
  int64_t* const fields[] = {&a.batch, &a.m,    &a.k,           &a.n,
                             &a.kept,  &a.rows, &a.granularity, &a.tiles};
  for (int i = 0; i < 8; ++i) *fields[i] = sizes[i];
  a.activation = static_cast<Activation>(sizes[8]);
  return a;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// small: whether blocks may have no more shared memory than those of the smallest GPU.
void fxprune_sim_reset(uint32_t seed, int plant, bool small) {
  sim::reset(seed, static_cast<sim::Plant>(plant), small ? sim::kLeastShared : sim::kMostShared);
}

void fxprune_sim_declare(const void* data, int64_t bytes, bool writable) {
  sim::declare(data, bytes, writable);
}

bool fxprune_sim_all_written(const void* data) {
  return sim::all_written(data);
}

// geometry: batch, channels, height, width, out_h, out_w, tap_words, then kernel, stride, padding
// and dilation, each (h, w), then the activation.
// pool and mean: as depthwise_pool() takes them, or null for the convolution alone.
const char* fxprune_sim_depthwise(int type, const void* x, const void* weight, const uint64_t* taps,
                                  const void* bias, void* out, float* pool, void* mean,
                                  const int64_t* g) {
  return guarded([&] {
    DepthwiseArgs a = depthwise_args(g);
    a.x = x, a.weight = weight, a.taps = taps, a.bias = bias, a.out = out, a.pool = pool;
    Simulator simulator;
    with_type(type, [&](auto t) {
      using T = decltype(t);
      if (pool == nullptr) return depthwise_taps<T>(simulator, a);
      depthwise_pool<T>(simulator, a, mean);
    });
  });
}

// The gradient of the input (weight: the weights, x: g) or of the weights (weight: g, x: x).
const char* fxprune_sim_depthwise_gradient(int type, bool of_input, const void* x,
                                           const void* weight, const uint64_t* taps, void* out,
                                           const int64_t* g) {
  return guarded([&] {
    DepthwiseArgs a = depthwise_args(g);
    a.x = x, a.weight = weight, a.taps = taps, a.out = out;
    a.flipped = of_input && is_reversed_convolution(a);
    Simulator simulator;
    with_type(type, [&](auto t) {
      using T = decltype(t);
      if (a.flipped) return depthwise_taps<T>(simulator, a);
      if (of_input) return depthwise_grad_input<T>(simulator, a);
      depthwise_grad_weight<T>(simulator, a);
    });
  });
}

// The sums per plane that `pool` must have room for.
int64_t fxprune_sim_pool_parts(const int64_t* g) {
  return pool_parts(depthwise_args(g));
}

// shape: tiles, kept K rows of all tiles, granularity, kept output features.
int64_t fxprune_sim_tile_image_bytes(const int64_t* shape) {
  return TileImage{shape[0], shape[1], shape[2]}.bytes();
}

const char* fxprune_sim_tile_image(const void* values, const int32_t* tile_ptr, void* out,
                                   const int64_t* shape) {
  return guarded([&] {
    Simulator simulator;
    tile_image(simulator, {{shape[0], shape[1], shape[2]}, values, tile_ptr, shape[3], out});
  });
}

// tensors: x, values, image, index, tile_ptr, columns, bias, residual, gate, out. sizes: batch, m,
// k, n, kept, rows, granularity, tiles, activation, whether sm_90a kernels may run, processors,
// whether the image is that of weights kept two in four, whether values are rounded to TF32.
const char* fxprune_sim_tile_gemm(int type, void* const* tensors, const int64_t* sizes) {
  return guarded([&] {
    TileGemmArgs a = tile_args(tensors, sizes);
    a.halved = sizes[11] != 0, a.tf32 = sizes[12] != 0;
    const Gpu gpu{sizes[9] != 0, static_cast<int>(sizes[10])};
    Simulator simulator;
    with_type(type, [&](auto t) { tile_gemm<decltype(t)>(simulator, a, gpu); });
  });
}

// tensors: as above, without a gate. sizes: as above up to the activation, then channels, groups,
// height, width, out_w, and kernel, stride, padding and dilation, each (h, w), and whether sm_90a
// kernels may run, processors, whether values are rounded to TF32.
const char* fxprune_sim_tile_conv(int type, void* const* tensors, const int64_t* sizes) {
  return guarded([&] {
    TileGemmArgs a = tile_args(tensors, sizes);
    TileWindow& w = a.window;
    w.channels = sizes[9], w.groups = sizes[10];
    int* const fields[] = {&w.height,   &w.width,      &w.out_w,     &w.kernel_h,
                           &w.kernel_w, &w.stride_h,   &w.stride_w,  &w.pad_h,
                           &w.pad_w,    &w.dilation_h, &w.dilation_w};
    for (int i = 0; i < 11; ++i) *fields[i] = static_cast<int>(sizes[11 + i]);
    a.tf32 = sizes[24] != 0;
    Simulator simulator;
    const Gpu gpu{sizes[22] != 0, static_cast<int>(sizes[23])};
    with_type(type, [&](auto t) { tile_conv<decltype(t)>(simulator, a, gpu); });
  });
}

// sizes: k, kept, granularity, tiles, kept K rows of all tiles.
const char* fxprune_sim_tile_pack(int element_bytes, bool unpack, const void* from, void* to,
                                  const int32_t* index, const int32_t* tile_ptr,
                                  const int32_t* columns, const int64_t* sizes) {
  return guarded([&] {
    Simulator simulator;
    const TilePackArgs a{index,    tile_ptr, columns, sizes[0], sizes[1],
                         sizes[2], sizes[3], from,    to};
    if (element_bytes == 4) return tile_pack<uint32_t>(simulator, a, sizes[4], unpack);
    tile_pack<uint16_t>(simulator, a, sizes[4], unpack);
  });
}

const char* fxprune_sim_transpose(int element_bytes, const void* x, void* out, int64_t rows,
                                  int64_t columns) {
  return guarded([&] {
    Simulator simulator;
    const TransposeArgs a{x, out, rows, columns};
    if (element_bytes == 4) return transpose<uint32_t>(simulator, a);
    transpose<uint16_t>(simulator, a);
  });
}

}  // extern "C"
#pragma GCC visibility pop
