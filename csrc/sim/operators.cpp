// The operators of csrc/cuda/operators.h on the simulator, for csrc/cuda/ops.cpp built with
// FXPRUNE_SIMULATED. Accesses to global memory are not checked here: the tensors are torch's.
#include "cuda/operators.h"

#include "sim/machine.h"

namespace fxprune::gpu {
namespace {

// The smallest GPU of compute capability 8, but for kernels that only sm_90a runs.
struct Simulator {
  template <class Kernel>
  void launch(const int64_t (&grid)[3], int64_t shared_bytes, const typename Kernel::Args& a) {
    sim::trust_global_memory();
    sim::launch(grid, Kernel::kThreads, Kernel::kBlocks, shared_bytes, [&a] { Kernel::run(a); });
  }
  int64_t most_shared_bytes() const { return sim::kLeastShared; }
} simulator;

}  // namespace

void depthwise_taps_cuda(const DepthwiseArgs& a, Element element, void*) {
  with_element(element, [&](auto t) { depthwise_taps<decltype(t)>(simulator, a); });
}

void depthwise_pool_cuda(const DepthwiseArgs& a, Element element, void* mean, void*) {
  with_element(element, [&](auto t) { depthwise_pool<decltype(t)>(simulator, a, mean); });
}

void depthwise_grad_input_cuda(const DepthwiseArgs& a, Element element, void* stream) {
  if (is_reversed_convolution(a)) {
    DepthwiseArgs reversed = a;
    reversed.flipped = true;
    return depthwise_taps_cuda(reversed, element, stream);
  }
  with_element(element, [&](auto t) { depthwise_grad_input<decltype(t)>(simulator, a); });
}

void depthwise_grad_weight_cuda(const DepthwiseArgs& a, Element element, void*) {
  with_element(element, [&](auto t) { depthwise_grad_weight<decltype(t)>(simulator, a); });
}

void tile_image_cuda(const TileImageArgs& a, void*) {
  tile_image(simulator, a);
}

void transpose_cuda(const TransposeArgs& a, int element_bytes, void*) {
  if (element_bytes == 4) return transpose<uint32_t>(simulator, a);
  transpose<uint16_t>(simulator, a);
}

void tile_pack_cuda(const TilePackArgs& a, int64_t rows, int element_bytes, bool unpack, void*) {
  if (element_bytes == 4) return tile_pack<uint32_t>(simulator, a, rows, unpack);
  tile_pack<uint16_t>(simulator, a, rows, unpack);
}

void dsconv_cuda(const DsconvArgs& a, Element element, void*) {
  if (element == Element::kHalf) return dsconv<Half>(simulator, a);
  dsconv<Bfloat>(simulator, a);
}

int64_t most_shared_bytes() {
  return simulator.most_shared_bytes();
}

void nm_gemm_cuda(const NmGemmArgs& a, Element element, void*) {
  if (element == Element::kHalf) return nm_gemm<Half>(simulator, a);
  nm_gemm<Bfloat>(simulator, a);
}

void nm_prune_cuda(const NmPruneArgs& a, Element element, void*) {
  with_element(element, [&](auto t) { nm_prune<decltype(t)>(simulator, a); });
}

void tile_conv_cuda(const TileGemmArgs& a, Element element, bool hopper, void*) {
  with_element(element, [&](auto t) { tile_conv<decltype(t)>(simulator, a, {hopper, 3}); });
}

void tile_gemm_cuda(const TileGemmArgs& a, Element element, bool hopper, void*) {
  with_element(element, [&](auto t) { tile_gemm<decltype(t)>(simulator, a, {hopper, 3}); });
}

void tile_grad_input_cuda(const TileGradientArgs& a, Element element, void*) {
  with_element(element, [&](auto t) { tile_grad_input<decltype(t)>(simulator, a); });
}

void tile_grad_weight_cuda(const TileGradientArgs& a, Element element, void*) {
  with_element(element, [&](auto t) { tile_grad_weight<decltype(t)>(simulator, a); });
}

}  // namespace fxprune::gpu
