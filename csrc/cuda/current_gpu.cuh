// What the current device offers the kernels of the tile-wise GEMM.
#pragma once

#include "cuda/launch.cuh"
#include "fxprune/cuda/tile_gemm.cuh"

namespace fxprune::gpu {

// hopper: whether the sm_90a kernels may run where the device has their instructions.
inline Gpu current_gpu(bool hopper) {
  int device = 0, major = 0, minor = 0, processors = 0;
  check_cuda(cudaGetDevice(&device), "asking for the device");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "asking");
  check_cuda(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "asking");
  return {hopper && major == 9 && minor == 0, processors};
}

}  // namespace fxprune::gpu
