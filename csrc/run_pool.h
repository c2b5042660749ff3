// Runs a prepared max pooling on the thread pool.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "fxprune/kernels.h"
#include "parallel.h"

namespace fxprune {

// Large images are cut in bands of rows, one a thread, as the convolutions around cut their pixels.
template <class T>
void run_max_pool(const MaxPoolOf<T>& a, int64_t pool) {
  constexpr int64_t kLeastRows = 4;
  const Kernels& k = kernels();
  const int64_t bands = a.out_h >= kLeastRows * pool ? pool : 1;
  const int64_t chunks = std::min<int64_t>(a.channels, 4);
  for_each_unit(bands * chunks, pool, [&](int64_t unit) {
    const int64_t band = unit / chunks, chunk = unit % chunks;
    const PoolSpan span = {a.channels * chunk / chunks, a.channels * (chunk + 1) / chunks,
                           a.out_h * band / bands, a.out_h * (band + 1) / bands};
    float* line = scratch(pool_scratch(a, k.width));
    if constexpr (std::is_same_v<T, Bf16>) {
      k.bf16.max_pool_bf16(a, span, line);
    } else {
      k.max_pool(a, span, line);
    }
  });
}

}  // namespace fxprune
