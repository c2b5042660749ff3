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

inline int device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "asking for the device");
  check_cuda(cudaDeviceGetAttribute(&value, which, device), "asking what it offers");
  return value;
}

struct CudaLauncher {
  cudaStream_t stream;

  // What a block of the current device may have.
  static int64_t most_shared_bytes() {
    return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  }

  template <class Kernel>
  void launch(const int64_t (&grid)[3], int64_t shared_bytes, const typename Kernel::Args& a) {
    if (grid[0] > INT32_MAX || grid[1] > 65535 || grid[2] > 65535) {
      throw std::runtime_error("fxprune: more blocks than a GPU starts at once; cut the batch");
    }
    if (shared_bytes > 48 << 10) {
      // What the device has and not what this call needs: another thread may be about to start the
      // same kernel with more.
      const int64_t most = most_shared_bytes();
      if (shared_bytes > most) {
        throw std::runtime_error("fxprune: a kernel needs " + std::to_string(shared_bytes) +
                                 " bytes of shared memory, a block of this GPU has " +
                                 std::to_string(most));
      }
      check_cuda(cudaFuncSetAttribute(entry<Kernel>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      static_cast<int>(most)),
                 "asking for shared memory");
    }
    const dim3 blocks(static_cast<unsigned>(grid[0]), static_cast<unsigned>(grid[1]),
                      static_cast<unsigned>(grid[2]));
    entry<Kernel><<<blocks, Kernel::kThreads, static_cast<size_t>(shared_bytes), stream>>>(a);
    check_cuda(cudaGetLastError(), "starting a kernel");
  }
};

}  // namespace fxprune::gpu
