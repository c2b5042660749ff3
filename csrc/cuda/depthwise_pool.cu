#include "fxprune/cuda/depthwise_pool.cuh"

#include "cuda/launch.cuh"
#include "cuda/operators.h"

namespace fxprune::gpu {

void depthwise_pool_cuda(const DepthwiseArgs& a, Element element, void* mean, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  with_element(element, [&](auto t) { depthwise_pool<decltype(t)>(launcher, a, mean); });
}

}  // namespace fxprune::gpu
