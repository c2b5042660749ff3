// The GPU operators as the binding sees them: no torch header, no CUDA header. Each enqueues on the
// stream of the current device and returns; each throws std::runtime_error when CUDA refuses.
#pragma once

#include "fxprune/cuda/depthwise_gradients.cuh"
#include "fxprune/cuda/depthwise_pool.cuh"
#include "fxprune/cuda/dsconv.cuh"
#include "fxprune/cuda/nm_gemm.cuh"
#include "fxprune/cuda/nm_prune.cuh"
#include "fxprune/cuda/tile_gemm.cuh"
#include "fxprune/cuda/tile_grad_input.cuh"
#include "fxprune/cuda/tile_grad_weight.cuh"
#include "fxprune/cuda/tile_pack.cuh"

namespace fxprune::gpu {

void depthwise_taps_cuda(const DepthwiseArgs& a, Element element, void* stream);
// mean: (batch, channels); a.pool has room for pool_parts(a) sums per plane.
void depthwise_pool_cuda(const DepthwiseArgs& a, Element element, void* mean, void* stream);
// Pointers as in depthwise_gradients.cuh.
void depthwise_grad_input_cuda(const DepthwiseArgs& a, Element element, void* stream);
void depthwise_grad_weight_cuda(const DepthwiseArgs& a, Element element, void* stream);
void tile_image_cuda(const TileImageArgs& a, void* stream);
void transpose_cuda(const TransposeArgs& a, int element_bytes, void* stream);
// rows: kept K rows of all tiles.
void tile_pack_cuda(const TilePackArgs& a, int64_t rows, int element_bytes, bool unpack,
                    void* stream);
// element: kHalf or kBfloat.
void dsconv_cuda(const DsconvArgs& a, Element element, void* stream);
// What a block of the current device may have.
int64_t most_shared_bytes();
// element: kHalf or kBfloat.
void nm_gemm_cuda(const NmGemmArgs& a, Element element, void* stream);
void nm_prune_cuda(const NmPruneArgs& a, Element element, void* stream);
// hopper: whether the sm_90a kernels may run.
void tile_conv_cuda(const TileGemmArgs& a, Element element, bool hopper, void* stream);
void tile_gemm_cuda(const TileGemmArgs& a, Element element, bool hopper, void* stream);
// Pointers as in tile_pieces.cuh; the weight's gradient in weight_gradient_parts() parts.
void tile_grad_input_cuda(const TileGradientArgs& a, Element element, void* stream);
void tile_grad_weight_cuda(const TileGradientArgs& a, Element element, void* stream);

}  // namespace fxprune::gpu
