// The scalar variant's activations, by the standard library. Apart from math.h, because a full
// specialisation is an ordinary function: compiled under another ISA's pragma it would leak that
// ISA.
#pragma once

#include <cmath>

#include "fxprune/math.h"
#include "fxprune/vec_scalar.h"

namespace fxprune {

template <>
struct Math<Scalar> {
  using Reg = Scalar::Reg;

  template <class F>
  static Reg each(Reg x, F f) {
    return Reg{f(x[0]), f(x[1]), f(x[2]), f(x[3])};
  }
  static Reg exp(Reg x) {
    return each(x, [](float a) { return std::exp(a); });
  }
  static Reg sigmoid(Reg x) {
    return each(x, [](float a) { return 1.0f / (1.0f + std::exp(-a)); });
  }
  static Reg silu(Reg x) {
    return each(x, [](float a) { return a / (1.0f + std::exp(-a)); });
  }
  static Reg gelu(Reg x) {
    return each(x, [](float a) { return 0.5f * a * (1.0f + std::erf(a * 0.707106781f)); });
  }
  static Reg tanh(Reg x) {
    return each(x, [](float a) { return std::tanh(a); });
  }
  static Reg gelu_tanh(Reg x) {
    return each(x, [](float a) {
      return 0.5f * a * (1.0f + std::tanh(0.797884561f * (a + 0.044715f * a * a * a)));
    });
  }
};

}  // namespace fxprune
