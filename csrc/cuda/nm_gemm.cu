#include "fxprune/cuda/nm_gemm.cuh"

#include "cuda/launch.cuh"
#include "cuda/operators.h"

namespace fxprune::gpu {

void nm_gemm_cuda(const NmGemmArgs& a, Element element, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  if (element == Element::kHalf) return nm_gemm<Half>(launcher, a);
  nm_gemm<Bfloat>(launcher, a);
}

}  // namespace fxprune::gpu
