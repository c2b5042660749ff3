// Runs a prepared LayerNorm over channels on the thread pool.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "fxprune/kernels.h"
#include "parallel.h"

namespace fxprune {

// Pixels are cut, as the products around cut them: each core reads what it wrote.
template <class T>
void run_channel_norm(const ChannelNormOf<T>& a, int64_t pool) {
  constexpr int64_t kUnits = 4;     // of a thread, to even out a busy core
  constexpr int64_t kTogether = 4;  // vectors that a kernel sums side by side
  const Kernels& k = kernels();
  const int64_t vecs = (a.size + k.width - 1) / k.width,
                units = pool == 1 ? 1 : std::min((vecs + kTogether - 1) / kTogether, kUnits * pool);
  if (a.channels == 0) return;
  for_each_unit(units, pool, [&](int64_t unit) {
    const int64_t begin = vecs * unit / units, end = vecs * (unit + 1) / units;
    if constexpr (std::is_same_v<T, Bf16>) {
      k.bf16.channel_norm_bf16(a, begin, end);
    } else {
      k.channel_norm(a, begin, end);
    }
  });
}

}  // namespace fxprune
