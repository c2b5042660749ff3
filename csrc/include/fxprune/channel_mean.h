// The mean of each plane: the squeeze of squeeze-and-excite, and global average pooling.
#pragma once

#include <cstdint>

namespace fxprune {

// x: (channels, size), planes `pitch` apart -> out: (channels). The order of the sum depends on
// `size` alone.
template <class V>
void channel_mean(const float* x, float* out, int64_t channels, int64_t size, int64_t pitch) {
  constexpr int kW = V::kWidth;
  for (int64_t c = 0; c < channels; ++c, x += pitch) {
    typename V::Reg a = V::zero(), b = V::zero();
    int64_t i = 0;
    for (; i + 2 * kW <= size; i += 2 * kW) {
      a = V::add(a, V::load(x + i));
      b = V::add(b, V::load(x + i + kW));
    }
    for (; i < size; i += kW) a = V::add(a, V::load(x + i, V::first(size - i)));
    out[c] = V::sum(V::add(a, b)) / static_cast<float>(size);
  }
}

}  // namespace fxprune
