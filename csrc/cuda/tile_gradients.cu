#include "cuda/launch.cuh"
#include "cuda/operators.h"

namespace fxprune::gpu {

void tile_grad_input_cuda(const TileGradientArgs& a, Element element, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  with_element(element, [&](auto t) { tile_grad_input<decltype(t)>(launcher, a); });
}

void tile_grad_weight_cuda(const TileGradientArgs& a, Element element, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  with_element(element, [&](auto t) { tile_grad_weight<decltype(t)>(launcher, a); });
}

}  // namespace fxprune::gpu
