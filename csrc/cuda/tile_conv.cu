#include "fxprune/cuda/tile_gemm.cuh"

#include "cuda/current_gpu.cuh"
#include "cuda/launch.cuh"
#include "cuda/operators.h"

namespace fxprune::gpu {

void tile_conv_cuda(const TileGemmArgs& a, Element element, bool hopper, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  const Gpu gpu = current_gpu(hopper);
  with_element(element, [&](auto t) { tile_conv<decltype(t)>(launcher, a, gpu); });
}

}  // namespace fxprune::gpu
