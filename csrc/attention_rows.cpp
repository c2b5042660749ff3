// fxprune::attention_rows: softmax(q k) v by heads, on row-major activations.
#include <cmath>

#include "check.h"
#include "run_attention.h"

namespace fxprune {
namespace {

// (B, H, rows, numbers) whose numbers lie side by side.
Tensor rows_of(const Tensor& t, const char* name) {
  check_tensor(t, name, element_types().float32, "float32");
  return t.size(3) == 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t);
}

const float* at(const Tensor& t, int64_t batch, int64_t head) {
  const auto step = [&t](int64_t dim) { return t.size(dim) == 1 ? 0 : t.stride(dim); };
  return data<float>(t) + batch * step(0) + head * step(1);
}

Tensor mask_rows(const Tensor& mask, int64_t batch, int64_t heads, int64_t queries, int64_t keys) {
  bool fits = mask.dim() == 4 && mask.size(3) == keys;
  const int64_t sizes[] = {batch, heads, queries};
  for (int64_t dim = 0; fits && dim < 3; ++dim)
    fits = mask.size(dim) == 1 || mask.size(dim) == sizes[dim];
  STD_TORCH_CHECK(fits, "mask must have shape (", batch, " or 1, ", heads, " or 1, ", queries,
                  " or 1, ", keys, "), got ", shape_of(mask));
  return rows_of(mask, "mask");
}

Tensor attention_rows_cpu(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                          const OptionalTensor& mask_in, double scale) {
  STD_TORCH_CHECK(q_in.dim() == 4, "q must have shape (B, heads, queries, depth), got ",
                  shape_of(q_in));
  STD_TORCH_CHECK(k_in.dim() == 4, "k must have shape (B, heads, keys, depth), got ",
                  shape_of(k_in));
  const int64_t batch = q_in.size(0), heads = q_in.size(1), queries = q_in.size(2),
                depth = q_in.size(3), keys = k_in.size(2);
  STD_TORCH_CHECK(keys >= 1 && depth >= 1, "attention needs at least one key and one feature, got ",
                  keys, " and ", depth);
  STD_TORCH_CHECK(std::isfinite(scale) && scale > 0, "scale must be above 0, got ", scale);
  check_shape(k_in, "k", {batch, heads, keys, depth});
  check_shape(v_in, "v", {batch, heads, keys, depth});
  const Tensor q = rows_of(q_in, "q"), k = rows_of(k_in, "k"), v = rows_of(v_in, "v");
  OptionalTensor mask;
  if (mask_in.has_value()) mask = mask_rows(*mask_in, batch, heads, queries, keys);

  Tensor out = empty_output(q, {batch, queries, heads, depth});
  if (batch * heads * queries == 0) return out;
  AttentionRows a{};
  a.depth = depth, a.queries = queries, a.keys = keys, a.scale = static_cast<float>(scale);
  a.q_pitch = q.stride(2), a.k_pitch = k.stride(2), a.v_pitch = v.stride(2);
  a.mask_pitch = mask.has_value() && mask->size(2) > 1 ? mask->stride(2) : 0;
  a.out_pitch = heads * depth;
  const int64_t pool = torch::stable::get_num_threads(), whole = batch * heads,
                parts = query_parts(whole, queries, pool);
  const Kernels& run = kernels();
  for_each_unit(whole * parts, pool, [&](int64_t unit) {
    const int64_t part = unit % parts, b = unit / parts / heads, h = unit / parts % heads;
    AttentionRows one = a;
    one.q = at(q, b, h), one.k = at(k, b, h), one.v = at(v, b, h);
    one.mask = mask.has_value() ? at(*mask, b, h) : nullptr;
    one.out = static_cast<float*>(out.mutable_data_ptr()) + (b * queries * heads + h) * depth;
    run.attention_rows(one, queries * part / parts, queries * (part + 1) / parts,
                       scratch(run.attention_rows_scratch(one)));
  });
  return out;
}

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) {
  m.impl("attention_rows", TORCH_BOX(&fxprune::attention_rows_cpu));
}
