// What the current device offers the kernels of the tile-wise GEMM.
#pragma once

#include "cuda/launch.cuh"
#include "fxprune/cuda/tile_gemm.cuh"

namespace fxprune::gpu {

// hopper: whether the sm_90a kernels may run where the device has their instructions.
inline Gpu current_gpu(bool hopper) {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor),
            minor = device_attribute(cudaDevAttrComputeCapabilityMinor);
  return {hopper && major == 9 && minor == 0, device_attribute(cudaDevAttrMultiProcessorCount)};
}

}  // namespace fxprune::gpu
