#include "fxprune/cuda/nm_prune.cuh"

#include "cuda/launch.cuh"
#include "cuda/operators.h"

namespace fxprune::gpu {

void nm_prune_cuda(const NmPruneArgs& a, Element element, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  if (element == Element::kFloat) return nm_prune<float>(launcher, a);
  if (element == Element::kHalf) return nm_prune<Half>(launcher, a);
  nm_prune<Bfloat>(launcher, a);
}

}  // namespace fxprune::gpu
