#include "fxprune/cuda/nm_prune.cuh"

#include "cuda/launch.cuh"
#include "cuda/operators.h"

namespace fxprune::gpu {

void nm_prune_cuda(const NmPruneArgs& a, Element element, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  with_element(element, [&](auto t) { nm_prune<decltype(t)>(launcher, a); });
}

}  // namespace fxprune::gpu
