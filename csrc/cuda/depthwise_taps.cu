#include "fxprune/cuda/depthwise_taps.cuh"

#include "cuda/launch.cuh"
#include "cuda/operators.h"

namespace fxprune::gpu {

void depthwise_taps_cuda(const DepthwiseArgs& a, Element element, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  if (element == Element::kFloat) return depthwise_taps<float>(launcher, a);
  if (element == Element::kHalf) return depthwise_taps<Half>(launcher, a);
  depthwise_taps<Bfloat>(launcher, a);
}

}  // namespace fxprune::gpu
