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
  const auto g = check_image<DepthwiseTaps>(x_in, kernel_size, stride, padding, dilation);
  const gpu::Element element = check_element(x_in);
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
  structure.check_features(out_features);
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
  copy_sizes(g, &d);
  d.tap_words = 1;
  gpu::dsconv_cuda(a, element, stream);
  return out;
}

}  // namespace
}  // namespace fxprune::cuda_ops

FXPRUNE_GPU_OPERATORS(m) {
  m.impl("dsconv", TORCH_BOX(&fxprune::cuda_ops::dsconv));
}
