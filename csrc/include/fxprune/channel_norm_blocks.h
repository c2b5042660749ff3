// LayerNorm over channels: blocks of pixels pass over their channels three times, for the mean, for
// the variance and for the result. Include only under a target pragma.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "fxprune/channel_norm.h"
#include "fxprune/unroll.h"

namespace fxprune {

template <class V>
struct ChannelNorms {
  using Reg = typename V::Reg;
  static constexpr int kW = V::kWidth, kVecs = 4;  // chains of sums that hide an addition's latency

  static Reg load(const float* p, int64_t n) {
    return n < kW ? V::load(p, V::first(n)) : V::load(p);
  }
  static Reg load(const Bf16* p, int64_t n) {
    return n < kW ? V::load_bf16(p, n) : V::load_bf16(p);
  }
  static void store(float* p, int64_t n, Reg y) {
    n < kW ? V::store(p, V::first(n), y) : V::store(p, y);
  }
  static void store(Bf16* p, int64_t n, Reg y) {
    n < kW ? V::store_bf16(p, n, y) : V::store_bf16(p, y);
  }

  // Pixels [pixel, pixel + count) of every channel, which fill up to Vecs vectors.
  template <int Vecs, class T>
  static void block(const ChannelNormOf<T>& a, int64_t pixel, int64_t count) {
    const int64_t tail = count - (Vecs - 1) * kW;
    const int64_t ldx = a.size + a.x_gap, ldo = a.size + a.out_gap;
    const T* x = a.x + pixel;
    const auto part = [tail, ldx, x](int64_t c, int v) {
      return load(x + c * ldx + v * kW, v + 1 < Vecs ? kW : tail);
    };
    Reg mean[Vecs], scale[Vecs];
    FXPRUNE_UNROLL
    for (int v = 0; v < Vecs; ++v) mean[v] = scale[v] = V::zero();
    for (int64_t c = 0; c < a.channels; ++c) {
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v) mean[v] = V::add(mean[v], part(c, v));
    }
    const Reg share = V::set1(1.0f / static_cast<float>(a.channels));
    FXPRUNE_UNROLL
    for (int v = 0; v < Vecs; ++v) mean[v] = V::mul(mean[v], share);
    for (int64_t c = 0; c < a.channels; ++c) {
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v) {
        const Reg centred = V::sub(part(c, v), mean[v]);
        scale[v] = V::fma(centred, centred, scale[v]);
      }
    }
    alignas(64) float lanes[kW];
    FXPRUNE_UNROLL
    for (int v = 0; v < Vecs; ++v) {
      V::store(lanes, V::fma(scale[v], share, V::set1(a.eps)));
      for (float& lane : lanes) lane = 1.0f / std::sqrt(lane);
      scale[v] = V::load(lanes);
    }
    T* out = a.out + pixel;
    for (int64_t c = 0; c < a.channels; ++c) {
      const Reg weight = V::set1(a.weight ? a.weight[c] : 1.0f),
                bias = V::set1(a.bias ? a.bias[c] : 0.0f);
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v) {
        const Reg y = V::mul(V::sub(part(c, v), mean[v]), scale[v]);
        store(out + c * ldo + v * kW, v + 1 < Vecs ? kW : tail, V::fma(y, weight, bias));
      }
    }
  }
};

// Vectors [begin, end) of the pixels.
template <class V, class T>
void channel_norm_of(const ChannelNormOf<T>& a, int64_t begin, int64_t end) {
  using N = ChannelNorms<V>;
  for (int64_t v = begin; v < end; v += N::kVecs) {
    const int64_t pixel = v * N::kW,
                  count = std::min(std::min(end, v + N::kVecs) * N::kW, a.size) - pixel;
    switch ((count + N::kW - 1) / N::kW) {
      case 1:
        N::template block<1>(a, pixel, count);
        break;
      case 2:
        N::template block<2>(a, pixel, count);
        break;
      case 3:
        N::template block<3>(a, pixel, count);
        break;
      default:
        N::template block<4>(a, pixel, count);
    }
  }
}

template <class V>
void channel_norm(const ChannelNorm& a, int64_t begin, int64_t end) {
  channel_norm_of<V>(a, begin, end);
}
template <class V>
void channel_norm_bf16(const ChannelNormBf16& a, int64_t begin, int64_t end) {
  channel_norm_of<V>(a, begin, end);
}

}  // namespace fxprune
