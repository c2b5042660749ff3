// The tile-wise GEMM on the GPU: which kernels run, and the transposes around them for activations
// that are row-major.
#pragma once

#include "fxprune/cuda/tile_gemm_ffma.cuh"
#include "fxprune/cuda/tile_gemm_mma.cuh"
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

// Feature-major: x (batch, k, m) -> out (batch, n, m). All of `a` is set but `vector`.
template <class T, class Launcher>
void tile_gemm(Launcher& launcher, TileGemmArgs a, const Gpu& gpu) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  a.vector = a.m % Pack<T>::kCount == 0 && aligned(a.x) && aligned(a.residual) && aligned(a.out);
  if (a.kept < a.n) {
    const int64_t grid[3] = {(a.batch * a.m + 1023) / 1024, a.n < 65535 ? a.n : 65535, 1};
    launcher.template launch<TileRest<T>>(grid, 0, a);
  }
  if (a.tiles == 0) return;
  if constexpr (!uses_image<T>()) {
    using Kernel = TileGemmFfma;
    const int64_t parts = (a.granularity + Kernel::kFeatures - 1) / Kernel::kFeatures;
    const int64_t grid[3] = {
        (a.m + Kernel::kTokens - 1) / Kernel::kTokens * a.batch * parts * a.tiles, 1, 1};
    launcher.template launch<Kernel>(grid, Kernel::kSharedBytes, a);
  } else {
    const auto run = [&](auto kernel, int features, int64_t most_blocks) {
      using Kernel = decltype(kernel);
      const int64_t items = tile_items(a, features, Kernel::kTokens);
      const int64_t grid[3] = {items < most_blocks ? items : most_blocks, 1, 1};
      launcher.template launch<Kernel>(grid, Kernel::kSharedBytes, a);
    };
    const int64_t panels = a.layout().panels();
    if (gpu.hopper && a.vector && a.gate == nullptr && panels % 2 == 0) {
      if (panels % 4 == 0) return run(TileGemmWgmma<T, 256>(), 256, gpu.processors);
      return run(TileGemmWgmma<T, 128>(), 128, gpu.processors);
    }
    if (panels % 2 == 0) return run(TileGemmMma<T, 128>(), 128, INT64_MAX);
    run(TileGemmMma<T, 64>(), 64, INT64_MAX);
  }
}

}  // namespace fxprune::gpu
