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
  if (element == Element::kFloat) return depthwise_grad_input<float>(launcher, a);
  if (element == Element::kHalf) return depthwise_grad_input<Half>(launcher, a);
  depthwise_grad_input<Bfloat>(launcher, a);
}

void depthwise_grad_weight_cuda(const DepthwiseArgs& a, Element element, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  if (element == Element::kFloat) return depthwise_grad_weight<float>(launcher, a);
  if (element == Element::kHalf) return depthwise_grad_weight<Half>(launcher, a);
  depthwise_grad_weight<Bfloat>(launcher, a);
}

}  // namespace fxprune::gpu
