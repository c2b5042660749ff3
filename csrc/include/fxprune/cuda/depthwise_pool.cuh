// A depthwise convolution and the mean of each of its planes, which squeeze-and-excite asks for:
// the kernel that has the results in registers adds them up, one sum per tile, and no one reads
// them again. Sums are of the results as they are stored, in a fixed order.
#pragma once

#include "fxprune/cuda/block_sum.cuh"
#include "fxprune/cuda/depthwise_taps.cuh"

namespace fxprune::gpu {

struct PoolArgs {
  const void* x;      // (planes, size), PlaneSums
  const float* sums;  // (planes, parts), PlaneMeans
  void* out;          // float (planes) from PlaneSums, elements (planes) from PlaneMeans
  int64_t planes, size, parts;
};

// The sum of each plane, for windows that DepthwiseTiles does not have. A block a plane.
template <class T>
struct PlaneSums {
  using Args = PoolArgs;
  static constexpr int kThreads = 256, kBlocks = 4, kSharedBytes = kThreads * 4;

  static FXPRUNE_GPU void run(const Args& a) {
    for (int64_t plane = block(0); plane < a.planes; plane += blocks(0)) {
      const T* x = static_cast<const T*>(a.x) + plane * a.size;
      float sum = 0.0f;
      for (int64_t i = thread(); i < a.size; i += kThreads) sum += to_float(load_global<T>(x + i));
      sum = add_threads<kThreads>(sum);
      if (thread() == 0) store_global<float>(static_cast<float*>(a.out) + plane, sum);
    }
  }
};

// A thread a plane.
template <class T>
struct PlaneMeans {
  using Args = PoolArgs;
  static constexpr int kThreads = 128, kBlocks = 8;

  static FXPRUNE_GPU void run(const Args& a) {
    for (int64_t plane = block(0) * kThreads + thread(); plane < a.planes;
         plane += blocks(0) * kThreads) {
      float sum = 0.0f;
      for (int64_t i = 0; i < a.parts; ++i) sum += load_global<float>(a.sums + plane * a.parts + i);
      store_global<T>(static_cast<T*>(a.out) + plane,
                      from_float<T>(sum / static_cast<float>(a.size)));
    }
  }
};

// Sums per plane that depthwise_pool() needs room for.
inline int64_t pool_parts(DepthwiseArgs a) {
  if (!has_tiles(a)) return 1;
  set_tiles(&a, DepthwiseTiles<Half, 3, 1, 4>::kThreads, tile_rows(a, true));
  return int64_t{a.tiles_x} * a.tiles_y;
}

// As depthwise_taps(), and mean (batch, channels). a.pool has room for pool_parts() sums per plane.
template <class T, class Launcher>
void depthwise_pool(Launcher& launcher, const DepthwiseArgs& a, void* mean) {
  const auto least = [](int64_t x, int64_t y) { return x < y ? x : y; };
  constexpr int64_t kMostBlocks = int64_t{1} << 20;
  depthwise_taps<T, true>(launcher, a);
  PoolArgs pool{a.out,        a.pool, a.pool, a.batch * a.channels, int64_t{a.out_h} * a.out_w,
                pool_parts(a)};
  if (!has_tiles(a)) {
    const int64_t grid[3] = {least(pool.planes, kMostBlocks), 1, 1};
    launcher.template launch<PlaneSums<T>>(grid, PlaneSums<T>::kSharedBytes, pool);
  }
  pool.out = mean;
  constexpr int kThreads = PlaneMeans<T>::kThreads;
  const int64_t grid[3] = {least((pool.planes + kThreads - 1) / kThreads, kMostBlocks), 1, 1};
  launcher.template launch<PlaneMeans<T>>(grid, 0, pool);
}

}  // namespace fxprune::gpu
