// fxprune::dsconv on the GPU: checks, and the hand-over to the fused kernel. Where that does not
// run (float, other windows, more channels than shared memory holds) the two parts run in turn.
#include "cuda/parts.h"

namespace fxprune::cuda_ops {
namespace {

Tensor dsconv(const Tensor& x_in, const Tensor& weight_in, const Tensor& taps_in,
              const OptionalTensor& first_bias_in, const Tensor& values, const Tensor& index,
              const Tensor& tile_ptr, const Tensor& columns, const OptionalTensor& bias_in,
              const OptionalTensor& residual_in, const IntList& kernel_size, const IntList& stride,
              const IntList& padding, const IntList& dilation, int64_t out_features,
              int64_t granularity, const Text& first_activation, const Text& activation) {
  check_windows(kernel_size, stride, padding, dilation);
  check_cuda_tensor(x_in, "x");
  const gpu::Element element = check_element(x_in);
  STD_TORCH_CHECK(x_in.dim() == 4, "x must have shape (B, C, H, W), got ", shape_of(x_in));
  DepthwiseTaps g{};
  g.batch = x_in.size(0), g.channels = x_in.size(1);
  g.height = x_in.size(2), g.width = x_in.size(3);
  set_windows(kernel_size, stride, padding, dilation, &g);
  check_window(&g);
  gpu::DsconvArgs a{};
  gpu::DepthwiseArgs& d = a.depthwise;
  d.channels = g.channels;
  copy_windows(g, &d);
  const OnDeviceOf guard(x_in);
  if (element == gpu::Element::kFloat || !gpu::has_tiles(d) ||
      gpu::dsconv_bytes(d) > gpu::most_shared_bytes()) {
    const Tensor between = depthwise_taps(x_in, weight_in, taps_in, first_bias_in, kernel_size,
                                          stride, padding, dilation, first_activation);
    return tile_gemm(between, values, index, tile_ptr, columns, bias_in, residual_in, std::nullopt,
                     out_features, granularity, 1, activation);
  }
  const Structure structure(index, tile_ptr, columns, granularity, x_in);
  STD_TORCH_CHECK(out_features >= 0 && structure.kept <= out_features, "columns must hold at most ",
                  out_features, " output features, got ", structure.kept);
  PackedValues weights(values, structure, x_in);
  check_shape(weight_in, "weight", {g.channels, g.kernel()});
  check_shape(taps_in, "taps", {g.channels, 1});
  const IntList shape = {g.batch, out_features, g.out_h, g.out_w};
  const OptionalTensor first_bias = like_input(first_bias_in, "depthwise_bias", x_in, {g.channels}),
                       bias = like_input(bias_in, "bias", x_in, {out_features}),
                       residual = like_input(residual_in, "residual", x_in, shape);
  const Tensor x = like_input(x_in, "x", x_in), weight = like_input(weight_in, "weight", x_in),
               taps = list_input(taps_in, "taps", x_in, element_types().int64, "int64");
  d.activation = check_activation(first_activation);
  gpu::TileGemmArgs& t = a.gemm;
  t.activation = check_activation(activation);
  Tensor out = empty_like(x, shape, type_of(x));
  if (out.numel() == 0) return out;

  void* const stream = current_stream(x);
  structure.fill(&t);
  t.rows = structure.rows;
  t.batch = g.batch, t.k = g.channels, t.n = out_features, t.m = g.out_h * g.out_w;
  weights.fill(&t, stream);
  t.bias = address(bias);
  t.residual = address(residual);
  t.out = out.mutable_data_ptr();
  d.x = x.const_data_ptr();
  d.weight = weight.const_data_ptr();
  d.taps = static_cast<const uint64_t*>(taps.const_data_ptr());
  d.bias = address(first_bias);
  d.batch = g.batch;
  d.height = small_size(g.height, "height"), d.width = small_size(g.width, "width");
  d.out_h = small_size(g.out_h, "height"), d.out_w = small_size(g.out_w, "width");
  d.tap_words = 1;
  gpu::dsconv_cuda(a, element, stream);
  return out;
}

}  // namespace
}  // namespace fxprune::cuda_ops

#ifdef FXPRUNE_SIMULATED
STABLE_TORCH_LIBRARY_IMPL(fxprune_simulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(fxprune, CUDA, m) {
#endif
  m.impl("dsconv", TORCH_BOX(&fxprune::cuda_ops::dsconv));
}
