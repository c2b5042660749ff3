// fxprune::attention: softmax(k q) v by heads, on feature-major activations.
#include <cmath>

#include "check.h"
#include "check_attention.h"
#include "run_attention.h"

namespace fxprune {
namespace {

Tensor attention_cpu(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                     const OptionalTensor& mask_in, int64_t heads, double scale) {
  STD_TORCH_CHECK(q_in.dim() == 3, "q must have shape (B, heads * depth, queries), got ",
                  shape_of(q_in));
  STD_TORCH_CHECK(k_in.dim() == 3, "k must have shape (B, heads * depth, keys), got ",
                  shape_of(k_in));
  const int64_t batch = q_in.size(0), features = q_in.size(1), queries = q_in.size(2),
                keys = k_in.size(2);
  AttentionBf16 a{};
  check_attention(features, queries, keys, heads, static_cast<float>(scale), &a);
  const Tensor q = bf16_input(q_in, "q"), k = bf16_input(k_in, "k"), v = bf16_input(v_in, "v");
  check_shape(k, "k", {batch, features, keys});
  check_shape(v, "v", {batch, features, keys});
  const OptionalTensor mask = bf16_input(mask_in, "mask", {batch, keys, queries});
  Tensor out = empty_output(q, {batch, features, queries});
  for (int64_t b = 0; b < batch; ++b) {
    a.q = data<Bf16>(q) + b * features * queries;
    a.k = data<Bf16>(k) + b * features * keys;
    a.v = data<Bf16>(v) + b * features * keys;
    a.mask = mask.has_value() ? data<Bf16>(*mask) + b * keys * queries : nullptr;
    a.out = static_cast<Bf16*>(out.mutable_data_ptr()) + b * features * queries;
    run_attention(a, torch::stable::get_num_threads());
  }
  return out;
}

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) {
  m.impl("attention", TORCH_BOX(&fxprune::attention_cpu));
}
