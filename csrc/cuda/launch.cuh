// Starts kernels of csrc/include/fxprune/cuda on a stream.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace fxprune::gpu {

template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocks)
    entry(const __grid_constant__ typename Kernel::Args a) {
  Kernel::run(a);
}

inline void check_cuda(cudaError_t error, const char* doing) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("fxprune: ") + doing + ": " + cudaGetErrorString(error));
}

struct CudaLauncher {
  cudaStream_t stream;

  template <class Kernel>
  void launch(const int64_t (&grid)[3], int64_t shared_bytes, const typename Kernel::Args& a) {
    if (shared_bytes > 48 << 10) {
      check_cuda(cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(shared_bytes)),
                 "asking for shared memory");
    }
    const dim3 blocks(static_cast<unsigned>(grid[0]), static_cast<unsigned>(grid[1]),
                      static_cast<unsigned>(grid[2]));
    entry<Kernel><<<blocks, Kernel::kThreads, static_cast<size_t>(shared_bytes), stream>>>(a);
    check_cuda(cudaGetLastError(), "starting a kernel");
  }
};

}  // namespace fxprune::gpu
