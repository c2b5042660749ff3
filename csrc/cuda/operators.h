// The GPU operators as the binding sees them: no torch header, no CUDA header. Each enqueues on the
// stream and returns; each throws std::runtime_error when CUDA refuses.
#pragma once

#include "fxprune/cuda/depthwise_taps.cuh"

namespace fxprune::gpu {

enum class Element : int { kFloat, kHalf, kBfloat };

void depthwise_taps_cuda(const DepthwiseArgs& a, Element element, void* stream);

}  // namespace fxprune::gpu
