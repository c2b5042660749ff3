// The tile-wise GEMM on the GPU: which kernels run, and the transposes around them for activations
// that are row-major.
#pragma once

#include "fxprune/cuda/tile_gemm_ffma.cuh"
#include "fxprune/cuda/tile_gemm_halved.cuh"
#include "fxprune/cuda/tile_gemm_mma.cuh"
#include "fxprune/cuda/tile_gemm_narrow.cuh"
#include "fxprune/cuda/tile_gemm_resident.cuh"
#include "fxprune/cuda/tile_gemm_tf32.cuh"
#include "fxprune/cuda/tile_gemm_wgmma.cuh"

namespace fxprune::gpu {

struct TransposeArgs {
  const void* x;  // (rows, columns)
  void* out;      // (columns, rows)
  int64_t rows, columns;
};

// Through squares of 32 in shared memory. Bits: an unsigned integer of the element's size.
template <class Bits>
struct Transpose {
  using Args = TransposeArgs;
  static constexpr int kThreads = 256, kBlocks = 4, kSide = 32;
  static constexpr int kPitch = (kSide + 1) * static_cast<int>(sizeof(Bits));
  static constexpr int kSharedBytes = kSide * kPitch;

  static FXPRUNE_GPU void run(const Args& a) {
    const int64_t across = (a.columns + kSide - 1) / kSide;
    const int64_t row = block(0) / across * kSide, column = block(0) % across * kSide;
    const int x = thread() % kSide;
    for (int y = thread() / kSide; y < kSide; y += kThreads / kSide) {
      if (row + y >= a.rows || column + x >= a.columns) continue;
      store_shared<Bits>(
          shared_memory() + y * kPitch + x * static_cast<int>(sizeof(Bits)),
          load_global<Bits>(static_cast<const Bits*>(a.x) + (row + y) * a.columns + column + x));
    }
    barrier();
    for (int y = thread() / kSide; y < kSide; y += kThreads / kSide) {
      if (column + y >= a.columns || row + x >= a.rows) continue;
      store_global<Bits>(
          static_cast<Bits*>(a.out) + (column + y) * a.rows + row + x,
          load_shared<Bits>(shared_memory() + x * kPitch + y * static_cast<int>(sizeof(Bits))));
    }
  }
};

template <class Bits, class Launcher>
void transpose(Launcher& launcher, const TransposeArgs& a) {
  using Kernel = Transpose<Bits>;
  const auto squares = [](int64_t size) { return (size + Kernel::kSide - 1) / Kernel::kSide; };
  const int64_t grid[3] = {squares(a.rows) * squares(a.columns), 1, 1};
  if (grid[0] > 0) launcher.template launch<Kernel>(grid, Kernel::kSharedBytes, a);
}

// What the machine offers: Hopper's instructions, and how many blocks run at once.
struct Gpu {
  bool hopper;
  int processors;
};

// True when the kernels read TileGemmArgs::image.
template <class T>
constexpr bool uses_image() {
  return sizeof(T) == 2;
}

// Runs a kernel over all items in blocks of one, but at most so many.
template <class Kernel, class Launcher>
void launch_items(Launcher& launcher, const TileGemmArgs& a, int features, int64_t most_blocks) {
  const int64_t items = tile_items(a, features, Kernel::kTokens);
  const int64_t grid[3] = {items < most_blocks ? items : most_blocks, 1, 1};
  launcher.template launch<Kernel>(grid, Kernel::kSharedBytes, a);
}

// Runs a kernel of floats, a block for each item.
template <class Kernel, class Launcher>
void launch_values(Launcher& launcher, const TileGemmArgs& a) {
  const int64_t grid[3] = {Kernel::Values::items(a), 1, 1};
  launcher.template launch<Kernel>(grid, Kernel::kSharedBytes, a);
}

// The kernels that run on every GPU.
template <class T, bool Windowed, class Launcher>
void tile_blocks_of(Launcher& launcher, const TileGemmArgs& a) {
  if constexpr (!uses_image<T>()) {
    if (a.tf32 && a.granularity > 64) {
      return launch_values<TileGemmTf32<128, Windowed>>(launcher, a);
    }
    if (a.tf32) return launch_values<TileGemmTf32<64, Windowed>>(launcher, a);
    launch_values<TileGemmFfma<Windowed>>(launcher, a);
  } else if (a.layout().panels() % 2 == 0) {
    launch_items<TileGemmMma<T, 128, Windowed>>(launcher, a, 128, INT64_MAX);
  } else {
    launch_items<TileGemmMma<T, 64, Windowed>>(launcher, a, 64, INT64_MAX);
  }
}

// An even number of panels on Hopper's instructions; without a window, rows that 16-byte copies can
// reach, and no gate.
template <class T, bool Windowed, class Launcher>
void tile_gemm_wgmma(Launcher& launcher, const TileGemmArgs& a, const Gpu& gpu) {
  if (a.layout().panels() % 4 == 0) {
    return launch_items<TileGemmWgmma<T, 256, Windowed>>(launcher, a, 256, gpu.processors);
  }
  launch_items<TileGemmWgmma<T, 128, Windowed>>(launcher, a, 128, gpu.processors);
}

// Sets `vector`: rows of m elements begin at 16-byte boundaries.
template <class T>
void set_vector(TileGemmArgs* a, const void* x) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  a->vector = a->m % Pack<T>::kCount == 0 && aligned(x) && aligned(a->residual) && aligned(a->out);
}

// Feature-major: x (batch, k, m) -> out (batch, n, m). All of `a` is set but `vector` and `window`.
template <class T, class Launcher>
void tile_gemm(Launcher& launcher, TileGemmArgs a, const Gpu& gpu) {
  set_vector<T>(&a, a.x);
  tile_rest<T>(launcher, a);
  if (a.tiles == 0) return;
  if constexpr (uses_image<T>()) {
    if (a.halved && a.layout().panels() % 2 == 0) {
      return launch_items<TileGemmHalved<T, 128>>(launcher, a, 128, INT64_MAX);
    }
    if (a.halved) return launch_items<TileGemmHalved<T, 64>>(launcher, a, 64, INT64_MAX);
  }
  if (is_narrow<T>(a)) return tile_gemm_narrow<T>(launcher, a);
  if constexpr (uses_image<T>()) {
    if (is_resident<T>(a)) return tile_gemm_resident<T>(launcher, a, gpu.processors);
    if (gpu.hopper && a.vector && a.gate == nullptr && a.layout().panels() % 2 == 0) {
      return tile_gemm_wgmma<T, false>(launcher, a, gpu);
    }
  }
  tile_blocks_of<T, false>(launcher, a);
}

// x (batch, channels, height, width) -> out (batch, n, out_h, out_w), m = out_h * out_w. All of `a`
// is set but `vector`.
template <class T, class Launcher>
void tile_conv(Launcher& launcher, TileGemmArgs a, const Gpu& gpu) {
  set_vector<T>(&a, a.out);  // pixels of x come one by one
  tile_rest<T>(launcher, a);
  if (a.tiles == 0) return;
  if constexpr (uses_image<T>()) {
    if (gpu.hopper && a.layout().panels() % 2 == 0) {
      return tile_gemm_wgmma<T, true>(launcher, a, gpu);
    }
  }
  tile_blocks_of<T, true>(launcher, a);
}

}  // namespace fxprune::gpu
