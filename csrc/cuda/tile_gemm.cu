#include "fxprune/cuda/tile_gemm.cuh"

#include "cuda/current_gpu.cuh"
#include "cuda/launch.cuh"
#include "cuda/operators.h"

namespace fxprune::gpu {
void tile_image_cuda(const TileImageArgs& a, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  tile_image(launcher, a);
}

void transpose_cuda(const TransposeArgs& a, int element_bytes, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  if (element_bytes == 4) return transpose<uint32_t>(launcher, a);
  transpose<uint16_t>(launcher, a);
}

void tile_pack_cuda(const TilePackArgs& a, int64_t rows, int element_bytes, bool unpack,
                    void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  if (element_bytes == 4) return tile_pack<uint32_t>(launcher, a, rows, unpack);
  tile_pack<uint16_t>(launcher, a, rows, unpack);
}

void tile_gemm_cuda(const TileGemmArgs& a, Element element, bool hopper, void* stream) {
  CudaLauncher launcher{static_cast<cudaStream_t>(stream)};
  const Gpu gpu = current_gpu(hopper);
  with_element(element, [&](auto t) { tile_gemm<decltype(t)>(launcher, a, gpu); });
}

}  // namespace fxprune::gpu
