#include "fxprune/cuda/depthwise_taps.cuh"

#include "cuda/launch.cuh"
#include "cuda/operators.h"

namespace fxprune::gpu {

void depthwise_taps_cuda(const DepthwiseArgs& a, Element element, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  with_element(element, [&](auto t) { depthwise_taps<decltype(t)>(launcher, a); });
}

}  // namespace fxprune::gpu
