#include "fxprune/cuda/depthwise_gradients.cuh"

#include "cuda/launch.cuh"
#include "cuda/operators.h"

namespace fxprune::gpu {

void depthwise_grad_input_cuda(const DepthwiseArgs& a, Element element, void* stream) {
  if (is_reversed_convolution(a)) {
    DepthwiseArgs reversed = a;
    reversed.flipped = true;
    return depthwise_taps_cuda(reversed, element, stream);
  }
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  with_element(element, [&](auto t) { depthwise_grad_input<decltype(t)>(launcher, a); });
}

void depthwise_grad_weight_cuda(const DepthwiseArgs& a, Element element, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  with_element(element, [&](auto t) { depthwise_grad_weight<decltype(t)>(launcher, a); });
}

}  // namespace fxprune::gpu
