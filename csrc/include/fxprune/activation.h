// The activations an operator can fuse behind its sum, by the names the schemas use.
#pragma once

#include <cstring>
#include <limits>

namespace fxprune {

enum class Activation : int {
  kNone,
  kRelu,
  kRelu6,
  kSilu,
  kHardswish,
  kHardsigmoid,
  kSigmoid,
  kGelu,
  kGeluTanh,
};

inline constexpr const char* kActivationNames[] = {
    "none", "relu", "relu6", "silu", "hardswish", "hardsigmoid", "sigmoid", "gelu", "gelu_tanh"};

// Sets `*activation` and returns true, or returns false when `name` is none of kActivationNames.
inline bool parse_activation(const char* name, Activation* activation) {
  for (int i = 0; i < 9; ++i) {
    if (std::strcmp(name, kActivationNames[i]) == 0) {
      *activation = static_cast<Activation>(i);
      return true;
    }
  }
  return false;
}

// none, relu and relu6 are one clamp, which kernels apply to their accumulators. The others run
// over the stored values while these are still in L1, so that no kernel is instantiated per
// activation; where a hardswish is too short for that, kernels apply it as they do a clamp
// (ends_in_registers).
struct Clamp {
  float low, high;
};

inline Clamp clamp_of(Activation activation) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  if (activation == Activation::kRelu) return {0.0f, kInf};
  if (activation == Activation::kRelu6) return {0.0f, 6.0f};
  return {-kInf, kInf};
}

inline bool is_clamp(Activation activation) {
  return activation <= Activation::kRelu6;
}

inline bool ends_in_registers(Activation activation) {
  return is_clamp(activation) || activation == Activation::kHardswish;
}

}  // namespace fxprune
