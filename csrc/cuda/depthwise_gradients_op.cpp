// The gradients of fxprune::depthwise_taps on the GPU: checks, and the hand-over to the kernels.
#include "cuda/structure.h"

namespace fxprune {
namespace {

// What both have in common: grad (B, C, OH, OW), the input's size (H, W), and the window.
gpu::DepthwiseArgs gradient_args(const Tensor& grad, const Tensor& taps, int64_t height,
                                 int64_t width, const IntList& kernel_size, const IntList& stride,
                                 const IntList& padding, const IntList& dilation) {
  check_windows(kernel_size, stride, padding, dilation);
  check_cuda_tensor(grad, "grad");
  STD_TORCH_CHECK(grad.dim() == 4, "grad must have shape (B, C, OH, OW), got ", shape_of(grad));
  DepthwiseTaps g{};
  g.batch = grad.size(0), g.channels = grad.size(1), g.height = height, g.width = width;
  set_windows(kernel_size, stride, padding, dilation, &g);
  check_window(&g);
  check_shape(grad, "grad", {g.batch, g.channels, g.out_h, g.out_w});
  const int64_t words = (g.kernel() + 63) / 64;
  check_shape(taps, "taps", {g.channels, words});
  gpu::DepthwiseArgs a{};
  copy_sizes(g, &a);
  small_size(g.out_h * g.out_w, "the output plane");
  small_size(g.kernel(), "kernel_size");
  a.tap_words = static_cast<int>(words);
  copy_windows(g, &a);
  return a;
}

Tensor grad_input(const Tensor& grad_in, const Tensor& weight_in, const Tensor& taps_in,
                  const IntList& size, const IntList& kernel_size, const IntList& stride,
                  const IntList& padding, const IntList& dilation) {
  check_pair(size, "size", 0);
  gpu::DepthwiseArgs a =
      gradient_args(grad_in, taps_in, size[0], size[1], kernel_size, stride, padding, dilation);
  const gpu::Element element = check_element(grad_in);
  check_shape(weight_in, "weight", {a.channels, int64_t{a.kernel_h} * a.kernel_w});
  const Tensor grad = like_input(grad_in, "grad", grad_in),
               weight = like_input(weight_in, "weight", grad_in),
               taps = list_input(taps_in, "taps", grad_in, element_types().int64, "int64");
  Tensor out = empty_like(grad, {a.batch, a.channels, size[0], size[1]}, type_of(grad));
  if (out.numel() == 0) return out;
  a.x = grad.const_data_ptr();
  a.weight = weight.const_data_ptr();
  a.taps = static_cast<const uint64_t*>(taps.const_data_ptr());
  a.out = out.mutable_data_ptr();
  const OnDeviceOf guard(grad);
  gpu::depthwise_grad_input_cuda(a, element, current_stream(grad));
  return out;
}

Tensor grad_weight(const Tensor& grad_in, const Tensor& x_in, const Tensor& taps_in,
                   const IntList& kernel_size, const IntList& stride, const IntList& padding,
                   const IntList& dilation) {
  STD_TORCH_CHECK(grad_in.dim() == 4, "grad must have shape (B, C, OH, OW), got ",
                  shape_of(grad_in));
  STD_TORCH_CHECK(
      x_in.dim() == 4 && x_in.size(0) == grad_in.size(0) && x_in.size(1) == grad_in.size(1),
      "x must have shape (", grad_in.size(0), ", ", grad_in.size(1), ", H, W), got ",
      shape_of(x_in));
  gpu::DepthwiseArgs a = gradient_args(grad_in, taps_in, x_in.size(2), x_in.size(3), kernel_size,
                                       stride, padding, dilation);
  const gpu::Element element = check_element(grad_in);
  const Tensor grad = like_input(grad_in, "grad", grad_in), x = like_input(x_in, "x", grad_in),
               taps = list_input(taps_in, "taps", grad_in, element_types().int64, "int64");
  Tensor out = empty_like(grad, {a.channels, int64_t{a.kernel_h} * a.kernel_w}, type_of(grad));
  if (out.numel() == 0) return out;
  a.x = x.const_data_ptr();
  a.weight = grad.const_data_ptr();
  a.taps = static_cast<const uint64_t*>(taps.const_data_ptr());
  a.out = out.mutable_data_ptr();
  const OnDeviceOf guard(grad);
  gpu::depthwise_grad_weight_cuda(a, element, current_stream(grad));
  return out;
}

}  // namespace
}  // namespace fxprune

FXPRUNE_GPU_OPERATORS(m) {
  m.impl("depthwise_grad_input", TORCH_BOX(&fxprune::grad_input));
  m.impl("depthwise_grad_weight", TORCH_BOX(&fxprune::grad_weight));
}
