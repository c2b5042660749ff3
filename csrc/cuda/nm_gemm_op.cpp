// fxprune::nm_mm on the GPU: checks, and the hand-over to the kernels.
#include "cuda/arguments.h"

namespace fxprune {
namespace {

Tensor nm_mm(const Tensor& x_in, const Tensor& weight_in) {
  check_cuda_tensor(x_in, "x");
  const gpu::Element element = check_element(x_in);
  STD_TORCH_CHECK(element != gpu::Element::kFloat, "x must be float16 or bfloat16");
  STD_TORCH_CHECK(x_in.dim() == 2 && weight_in.dim() == 2 && x_in.size(1) == weight_in.size(0),
                  "x and weight must have shapes (rows, K) and (K, N), got ", shape_of(x_in),
                  " and ", shape_of(weight_in));
  const Tensor x = like_input(x_in, "x", x_in), weight = like_input(weight_in, "weight", x_in);
  gpu::NmGemmArgs a{};
  a.rows = x.size(0), a.k = x.size(1), a.n = weight.size(1);
  Tensor out = empty_like(x, {a.rows, a.n}, type_of(x));
  if (out.numel() == 0) return out;
  const OnDeviceOf guard(x);
  const Tensor packed = empty_like(x, {a.packed_elements()}, type_of(x)),
               places = empty_like(x, {a.places_elements()}, type_of(x));
  a.x = x.const_data_ptr();
  a.weight = weight.const_data_ptr();
  a.out = out.mutable_data_ptr();
  a.packed = packed.mutable_data_ptr();
  a.places = static_cast<uint16_t*>(places.mutable_data_ptr());
  gpu::nm_gemm_cuda(a, element, current_stream(x));
  return out;
}

}  // namespace
}  // namespace fxprune

FXPRUNE_GPU_OPERATORS(m) {
  m.impl("nm_mm", TORCH_BOX(&fxprune::nm_mm));
}
