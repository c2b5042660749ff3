// What fxprune::nm_prune demands of its arguments, on every device, and how it reads them.
#pragma once

#include <algorithm>
#include <array>
#include <string>

#include "channels_last.h"
#include "check.h"
#include "fxprune/nm_prune.h"

namespace fxprune {

constexpr std::array<const char*, 5> kNmFunctions = {"random", "magnitude", "rescaled_magnitude",
                                                     "group_rescaled_magnitude", "mvue"};

inline NmFunction check_nm_function(const Text& name) {
  std::string legal;
  for (size_t i = 0; i < kNmFunctions.size(); ++i) {
    if (name.value == kNmFunctions[i]) return static_cast<NmFunction>(i);
    legal += (i ? ", " : "") + std::string(kNmFunctions[i]);
  }
  STD_TORCH_CHECK(false, "unknown function '", name.value, "'; legal: ", legal);
}

inline Element check_nm_element(const Tensor& grad) {
  static const std::array<int32_t, 3> types = {
      aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  const auto found = std::find(types.begin(), types.end(), type_of(grad));
  STD_TORCH_CHECK(found != types.end(), "grad must be float32, bfloat16 or float16");
  return static_cast<Element>(found - types.begin());
}

// Checks the counters that random numbers are keyed by, but for their device.
inline void check_nm_key(const OptionalTensor& key, NmFunction function) {
  const bool random = function == NmFunction::kRandom || function == NmFunction::kMvue;
  STD_TORCH_CHECK(key.has_value() || !random, "key must be given for function '",
                  kNmFunctions[static_cast<size_t>(function)], "'");
  if (!key.has_value()) return;
  STD_TORCH_CHECK(type_of(*key) == element_types().int64, "key must be int64");
  STD_TORCH_CHECK(key->dim() == 1, "key must have one dimension, got shape ", shape_of(*key));
}

// The state that counters on the CPU lead to; 0 without any.
inline uint64_t mix_counters(const OptionalTensor& key_in) {
  uint64_t state = 0;
  if (!key_in.has_value()) return state;
  STD_TORCH_CHECK(key_in->is_cpu(), "key must be on the CPU");
  const Tensor key = key_in->is_contiguous() ? *key_in : torch::stable::contiguous(*key_in);
  for (int64_t i = 0; i < key.size(0); ++i) {
    state = add_counter(state, static_cast<uint64_t>(data<int64_t>(key)[i]));
  }
  return state;
}

// Sets the geometry of `a` for a gradient with its channels on axis `dim`, and returns the
// gradient, made dense where it is neither contiguous nor channels-last.
template <class Args>
Tensor check_nm_geometry(const Tensor& grad_in, int64_t n, int64_t m, int64_t dim, int64_t groups,
                         Args* a) {
  STD_TORCH_CHECK(m >= 1 && m <= kMostOfGroup, "m must lie in [1, ", kMostOfGroup, "], got ", m);
  STD_TORCH_CHECK(n >= 1 && n <= m, "n must lie in [1, m = ", m, "], got ", n);
  STD_TORCH_CHECK(dim == 1 || dim == -1, "dim must be 1 or -1, got ", dim);
  const int64_t rank = grad_in.dim();
  STD_TORCH_CHECK(rank >= (dim == 1 ? 2 : 1), "grad must have ",
                  dim == 1 ? "two dimensions" : "one", " or more, got shape ", shape_of(grad_in));
  a->n = n, a->m = m, a->conv_groups = groups;
  a->channels = grad_in.size(dim == 1 ? 1 : rank - 1);
  STD_TORCH_CHECK(groups >= 1 && a->channels % groups == 0, "groups must divide the ", a->channels,
                  " channels, got ", groups);
  const bool last = dim == 1 && !grad_in.is_contiguous() && is_channels_last(grad_in);
  const Tensor grad =
      last || grad_in.is_contiguous() ? grad_in : torch::stable::contiguous(grad_in);
  a->row_major = last || dim == -1;
  a->samples = dim == -1 && rank < 3 ? 1 : grad.size(0);
  a->positions = grad.numel() == 0 ? 0 : grad.numel() / (a->samples * a->channels);
  return grad;
}

}  // namespace fxprune
