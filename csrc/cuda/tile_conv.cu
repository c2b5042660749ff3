#include "fxprune/cuda/tile_gemm.cuh"

#include "cuda/launch.cuh"
#include "cuda/operators.h"

namespace fxprune::gpu {

void tile_conv_cuda(const TileGemmArgs& a, Element element, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  with_element(element, [&](auto t) { tile_conv<decltype(t)>(launcher, a); });
}

}  // namespace fxprune::gpu
