// The activations of fxprune/activation.h on an array of sums, in float.
#pragma once

#include <cmath>

#include "fxprune/activation.h"
#include "fxprune/cuda/number.cuh"

namespace fxprune::gpu {

FXPRUNE_GPU float sigmoid(float x) {
#ifdef __CUDACC__
  return __fdividef(1.0f, 1.0f + __expf(-x));
#else
  return 1.0f / (1.0f + std::exp(-x));
#endif
}

FXPRUNE_GPU float gelu_tanh(float x) {
  // 0.5 (1 + tanh(u)) = sigmoid(2u)
  const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
  return x * sigmoid(2.0f * u);
}

template <int N>
FXPRUNE_GPU void activate(Activation activation, float (&v)[N]) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kRelu:
      FXPRUNE_UNROLLED
      for (int i = 0; i < N; ++i) v[i] = larger(v[i], 0.0f);
      return;
    case Activation::kRelu6:
      FXPRUNE_UNROLLED
      for (int i = 0; i < N; ++i) v[i] = smaller(larger(v[i], 0.0f), 6.0f);
      return;
    case Activation::kHardswish:
    case Activation::kHardsigmoid:
      FXPRUNE_UNROLLED
      for (int i = 0; i < N; ++i) {
        const float clamped = smaller(larger(v[i] + 3.0f, 0.0f), 6.0f);
        v[i] = (activation == Activation::kHardswish ? v[i] * clamped : clamped) * (1.0f / 6.0f);
      }
      return;
    case Activation::kSilu:
    case Activation::kSigmoid:
      FXPRUNE_UNROLLED
      for (int i = 0; i < N; ++i) {
        const float gate = sigmoid(v[i]);
        v[i] = activation == Activation::kSilu ? v[i] * gate : gate;
      }
      return;
    case Activation::kGelu:
      FXPRUNE_UNROLLED
      for (int i = 0; i < N; ++i) v[i] = 0.5f * v[i] * (1.0f + erff(v[i] * 0.7071067812f));
      return;
    case Activation::kGeluTanh:
      FXPRUNE_UNROLLED
      for (int i = 0; i < N; ++i) v[i] = gelu_tanh(v[i]);
      return;
  }
}

}  // namespace fxprune::gpu
