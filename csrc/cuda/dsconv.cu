#include "fxprune/cuda/dsconv.cuh"

#include "cuda/launch.cuh"
#include "cuda/operators.h"

namespace fxprune::gpu {

void dsconv_cuda(const DsconvArgs& a, Element element, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  if (element == Element::kHalf) return dsconv<Half>(launcher, a);
  dsconv<Bfloat>(launcher, a);
}

int64_t most_shared_bytes() {
  return CudaLauncher::most_shared_bytes();
}

}  // namespace fxprune::gpu
