// The sum of one number per thread of a block.
#pragma once

#include "fxprune/cuda/ptx.cuh"

namespace fxprune::gpu {

// Left in thread 0, in a fixed order. Needs 4 bytes of shared memory per thread from its start on,
// which are free again when it returns.
template <int kThreads>
FXPRUNE_GPU float add_threads(float sum) {
  char* own = shared_memory() + 4 * thread();
  store_shared<float>(own, sum);
  for (int half = kThreads / 2; half > 0; half /= 2) {
    barrier();
    if (thread() < half) {
      sum += load_shared<float>(own + 4 * half);
      store_shared<float>(own, sum);
    }
  }
  barrier();
  return sum;
}

}  // namespace fxprune::gpu
