#include "fxprune/cuda/depthwise_pool.cuh"

#include "cuda/launch.cuh"
#include "cuda/operators.h"

namespace fxprune::gpu {

void depthwise_taps_cuda(const DepthwiseArgs& a, Element element, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  if (element == Element::kFloat) return depthwise_taps<float>(launcher, a);
  if (element == Element::kHalf) return depthwise_taps<Half>(launcher, a);
  depthwise_taps<Bfloat>(launcher, a);
}

void depthwise_pool_cuda(const DepthwiseArgs& a, Element element, void* mean, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  if (element == Element::kFloat) return depthwise_pool<float>(launcher, a, mean);
  if (element == Element::kHalf) return depthwise_pool<Half>(launcher, a, mean);
  depthwise_pool<Bfloat>(launcher, a, mean);
}

}  // namespace fxprune::gpu
