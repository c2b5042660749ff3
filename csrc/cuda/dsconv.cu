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
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device), "asking for the device");
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "asking for its shared memory");
  return bytes;
}

}  // namespace fxprune::gpu
