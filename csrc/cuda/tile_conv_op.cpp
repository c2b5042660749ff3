// fxprune::tile_conv on the GPU: checks, and the hand-over to the kernels.
#include "cuda/parts.h"

namespace fxprune {
namespace {

Tensor tile_conv(const Tensor& x_in, const Tensor& values, const Tensor& index,
                 const Tensor& tile_ptr, const Tensor& columns, const OptionalTensor& bias_in,
                 const OptionalTensor& residual_in, int64_t out_features, int64_t granularity,
                 const IntList& kernel_size, const IntList& stride, const IntList& padding,
                 const IntList& dilation, int64_t groups, const Text& activation) {
  const auto g = check_image<TileConv>(x_in, kernel_size, stride, padding, dilation);
  const gpu::Element element = check_element(x_in);
  STD_TORCH_CHECK(groups >= 1 && g.channels % groups == 0 && out_features % groups == 0,
                  "groups must divide ", g.channels, " input and ", out_features,
                  " output channels, got ", groups);
  const int64_t window = g.kernel_h * g.kernel_w, most = int64_t{1} << 24;
  STD_TORCH_CHECK(window <= most && g.channels / groups * window <= most, "a group of ",
                  g.channels / groups, " channels under a window of ", window,
                  " elements is too large");
  const Structure structure(index, tile_ptr, columns, granularity, x_in);
  structure.check_features(out_features);
  PackedValues weights(values, structure, x_in);
  gpu::TileGemmArgs a{};
  a.activation = check_activation(activation);
  a.batch = g.batch, a.m = g.out_h * g.out_w, a.n = out_features;
  a.k = g.channels / groups * window, a.rows = structure.rows;
  const IntList shape = {a.batch, a.n, g.out_h, g.out_w};
  const OptionalTensor bias = like_input(bias_in, "bias", x_in, {out_features});
  const OptionalTensor residual = like_input(residual_in, "residual", x_in, shape);
  const Tensor x = like_input(x_in, "x", x_in);
  Tensor out = empty_like(x, shape, type_of(x));
  if (out.numel() == 0) return out;
  structure.fill(&a);
  gpu::TileWindow& w = a.window;
  w.channels = g.channels, w.groups = groups;
  w.height = small_size(g.height, "height"), w.width = small_size(g.width, "width");
  w.out_w = small_size(g.out_w, "width");
  small_size(a.m, "the output plane");
  copy_windows(g, &w);

  const OnDeviceOf guard(x);
  void* const stream = current_stream(x);
  weights.fill(&a, stream);
  a.x = x.const_data_ptr();
  a.bias = address(bias);
  a.residual = address(residual);
  a.out = out.mutable_data_ptr();
  gpu::tile_conv_cuda(a, element, cuda_ops::newest_kernels(), stream);
  return out;
}

}  // namespace
}  // namespace fxprune

FXPRUNE_GPU_OPERATORS(m) {
  m.impl("tile_conv", TORCH_BOX(&fxprune::tile_conv));
}
