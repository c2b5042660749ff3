#include "fxprune/cuda/tile_gemm.cuh"

#include "cuda/launch.cuh"
#include "cuda/operators.h"

namespace fxprune::gpu {

void tile_conv_cuda(const TileGemmArgs& a, Element element, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  if (element == Element::kFloat) return tile_conv<float>(launcher, a);
  if (element == Element::kHalf) return tile_conv<Half>(launcher, a);
  tile_conv<Bfloat>(launcher, a);
}

}  // namespace fxprune::gpu
