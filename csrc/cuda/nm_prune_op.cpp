// fxprune::nm_prune on the GPU: checks, and the hand-over to the kernels.
#include "cuda/arguments.h"
#include "nm_arguments.h"

namespace fxprune {
namespace {

Tensor nm_prune(const Tensor& grad_in, const OptionalTensor& key_in, int64_t n, int64_t m,
                int64_t dim, int64_t groups, const Text& function, int64_t layer) {
  check_nm_element(grad_in);
  check_cuda_tensor(grad_in, "grad");
  gpu::NmPruneArgs a{};
  a.function = check_nm_function(function);
  const Tensor grad = check_nm_geometry(grad_in, n, m, dim, groups, &a);
  check_nm_key(key_in, a.function);
  // Counters on the CPU are mixed here and become part of the launch; those on the GPU stay there,
  // so that a CUDA graph draws new numbers when they change.
  OptionalTensor key;
  if (key_in.has_value() && on_gpu(*key_in)) {
    key = list_input(*key_in, "key", grad, element_types().int64, "int64");
    a.key = static_cast<const int64_t*>(key->const_data_ptr());
    a.key_count = key->size(0);
  } else {
    a.state = mix_counters(key_in);
  }
  a.layer = layer;
  Tensor out = empty_same(grad);
  if (grad.numel() == 0) return out;
  OptionalTensor factors;
  if (a.function == NmFunction::kRescaled) {
    factors = empty_like(grad, {a.samples, a.channels}, element_types().float32);
    a.factors = static_cast<float*>(factors->mutable_data_ptr());
  }
  a.x = grad.const_data_ptr();
  a.out = out.mutable_data_ptr();
  const OnDeviceOf guard(grad);
  gpu::nm_prune_cuda(a, check_element(grad), current_stream(grad));
  return out;
}

}  // namespace
}  // namespace fxprune

FXPRUNE_GPU_OPERATORS(m) {
  m.impl("nm_prune", TORCH_BOX(&fxprune::nm_prune));
}
