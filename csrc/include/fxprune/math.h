// exp, and the activations built on it, over vectors and over buffers.
//
// exp: relative error below 2e-7; math_scalar.h has the scalar variant, by the standard library.
// The erf form of GELU is x times the normal distribution function; the other smooth activations
// are x * sigmoid(u(x)) or sigmoid(x).
#pragma once

#include <cstdint>

#include "fxprune/activation.h"
#include "fxprune/fours.h"
#include "fxprune/unroll.h"

namespace fxprune {

template <class V>
struct Math {
  using Reg = typename V::Reg;

  // Flushes to 1e-38 instead of 0.
  static Reg exp(Reg x) {
    // Above, the result is infinity. Below, it stays the smallest normal number: every caller adds
    // it to 1, and a denormal one would cost a hundred cycles.
    x = V::min(V::set1(89.0f), V::max(V::set1(-87.3f), x));
    // The nearest integer: adding 3 * 2^22 rounds to it.
    const Reg shift = V::set1(12582912.0f);
    const Reg n = V::sub(V::fma(x, V::set1(1.44269504f), shift), shift);
    // ln 2 in two parts, the first with trailing zeros, so that n * high is exact.
    Reg r = V::fma(n, V::set1(-0.693359375f), x);
    r = V::fma(n, V::set1(2.12194440e-4f), r);
    Reg p = V::set1(0.00138145965f);
    p = V::fma(p, r, V::set1(0.00836871751f));
    p = V::fma(p, r, V::set1(0.041668389f));
    p = V::fma(p, r, V::set1(0.166665211f));
    p = V::fma(p, r, V::set1(0.5f));
    p = V::fma(p, r, V::set1(1.0f));
    p = V::fma(p, r, V::set1(1.0f));
    return V::scale(p, n);
  }

  // x / (1 + exp(-u))
  static Reg gated(Reg x, Reg u) {
    return V::ratio(x, V::add(V::set1(1.0f), exp(V::sub(V::zero(), u))));
  }

  static Reg sigmoid(Reg x) { return gated(V::set1(1.0f), x); }
  static Reg silu(Reg x) { return gated(x, x); }

  // x (1/2 + t P(t^2) / Q(t^2)), t = x within 6. The quotient is fitted to Phi(x) - 1/2 up to 5.6,
  // to an error of 1e-8, and passes 1/2 behind it: from there on the result is x, or zero.
  static Reg gelu(Reg x) {
    const Reg t = V::min(V::set1(6.0f), V::max(V::set1(-6.0f), x)), z = V::mul(t, t);
    Reg p = V::set1(2.21452989e-08f), q = V::set1(1.18020773e-06f);
    p = V::fma(p, z, V::set1(6.35648257e-06f));
    q = V::fma(q, z, V::set1(7.51009429e-05f));
    p = V::fma(p, z, V::set1(0.000173848253f));
    q = V::fma(q, z, V::set1(0.00191296497f));
    p = V::fma(p, z, V::set1(0.00470724516f));
    q = V::fma(q, z, V::set1(0.0289399642f));
    p = V::fma(p, z, V::set1(0.0343758985f));
    q = V::fma(q, z, V::set1(0.252833307f));
    p = V::fma(p, z, V::set1(0.398942232f));
    q = V::fma(q, z, V::set1(1.0f));
    const Reg half = V::set1(0.5f), least = V::set1(-0.5f);
    const Reg y = V::min(half, V::max(least, V::ratio(V::mul(t, p), q)));
    return V::mul(x, V::add(half, y));
  }

  // x P(x^2) / Q(x^2), fitted to a relative error of 3e-7. From |x| = 9 on it is exactly 1.
  static Reg tanh(Reg x) {
    x = V::min(V::set1(9.0f), V::max(V::set1(-9.0f), x));
    const Reg z = V::mul(x, x);
    Reg p = V::set1(1.33548467e-08f), q = V::set1(7.77663794e-07f);
    p = V::fma(p, z, V::set1(2.06092286e-05f));
    p = V::fma(p, z, V::set1(0.0034955975f));
    p = V::fma(p, z, V::set1(0.133810337f));
    p = V::fma(p, z, V::set1(0.999999979f));
    q = V::fma(q, z, V::set1(0.000328564981f));
    q = V::fma(q, z, V::set1(0.0258770183f));
    q = V::fma(q, z, V::set1(0.467143493f));
    q = V::fma(q, z, V::set1(1.0f));
    const Reg y = V::div(V::mul(x, p), q);
    return V::min(V::set1(1.0f), V::max(V::set1(-1.0f), y));
  }

  static Reg gelu_tanh(Reg x) {
    // 1 + tanh(t) = 2 sigmoid(2t), t = sqrt(2/pi) (x + 0.044715 x^3)
    const Reg cubic = V::fma(V::mul(x, x), V::set1(0.0713548163f), V::set1(1.59576912f));
    return gated(x, V::mul(x, cubic));
  }
};

template <class V>
typename V::Reg hardsigmoid(typename V::Reg x) {
  const auto shifted = V::max(V::zero(), V::add(x, V::set1(3.0f)));
  return V::sixth(V::min(V::set1(6.0f), shifted));
}

template <class V>
typename V::Reg hardswish(typename V::Reg x) {
  const auto shifted = V::max(V::zero(), V::add(x, V::set1(3.0f)));
  return V::sixth(V::mul(x, V::min(V::set1(6.0f), shifted)));
}

// Applies an activation that ends in registers to sums. Inlined, or they would pass through memory.
template <class V, int Rows, int Vecs>
__attribute__((always_inline)) inline void end_sums(Activation activation,
                                                    typename V::Reg (&sums)[Rows][Vecs]) {
  if (activation == Activation::kHardswish) {
    FXPRUNE_UNROLL
    for (int r = 0; r < Rows; ++r) {
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v) sums[r][v] = hardswish<V>(sums[r][v]);
    }
    return;
  }
  const Clamp clamp = clamp_of(activation);
  const auto low = V::set1(clamp.low), high = V::set1(clamp.high);
  FXPRUNE_UNROLL
  for (int r = 0; r < Rows; ++r) {
    FXPRUNE_UNROLL
    for (int v = 0; v < Vecs; ++v) sums[r][v] = V::min(high, V::max(low, sums[r][v]));
  }
}

// f(V(), x) is the function of a vector x. Vectors are taken by four, where they are wide enough to
// have any: their functions are long chains.
template <class V, class F>
void transform(float* p, int64_t n, const F& f) {
  int64_t i = 0;
  if constexpr (V::kWidth >= 8) {
    using W = Fours<V>;
    for (; i + W::kWidth <= n; i += W::kWidth) W::store(p + i, f(W(), W::load(p + i)));
  }
  for (; i + V::kWidth <= n; i += V::kWidth) V::store(p + i, f(V(), V::load(p + i)));
  if (i < n) {
    const auto mask = V::first(n - i);
    V::store(p + i, mask, f(V(), V::load(p + i, mask)));
  }
}

// Applies an activation that is no clamp to p[0 .. n). Clamps are the kernels' own.
template <class V>
void activate(Activation activation, float* p, int64_t n) {
  switch (activation) {
    case Activation::kSilu:
      return transform<V>(p, n, [](auto v, auto x) { return Math<decltype(v)>::silu(x); });
    case Activation::kSigmoid:
      return transform<V>(p, n, [](auto v, auto x) { return Math<decltype(v)>::sigmoid(x); });
    case Activation::kGelu:
      return transform<V>(p, n, [](auto v, auto x) { return Math<decltype(v)>::gelu(x); });
    case Activation::kGeluTanh:
      return transform<V>(p, n, [](auto v, auto x) { return Math<decltype(v)>::gelu_tanh(x); });
    case Activation::kHardswish:
      return transform<V>(p, n, [](auto v, auto x) { return hardswish<decltype(v)>(x); });
    case Activation::kHardsigmoid:
      return transform<V>(p, n, [](auto v, auto x) { return hardsigmoid<decltype(v)>(x); });
    default:
      return;
  }
}

}  // namespace fxprune
