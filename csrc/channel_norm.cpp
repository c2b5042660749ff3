// fxprune::channel_norm: LayerNorm over the channels of feature-major activations.
#include <vector>

#include "check.h"
#include "run_norm.h"

namespace fxprune {
namespace {

template <class T>
Tensor channel_norm_on(const Tensor& x, ChannelNormOf<T> a) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < x.dim(); ++i) shape.push_back(x.size(i));
  Tensor out = empty_output(x, shape);
  const int64_t image = a.channels * a.size;
  for (int64_t b = 0; b < x.size(0) && image > 0; ++b) {
    a.x = data<T>(x) + b * image;
    a.out = static_cast<T*>(out.mutable_data_ptr()) + b * image;
    run_channel_norm(a, torch::stable::get_num_threads());
  }
  return out;
}

Tensor channel_norm_cpu(const Tensor& x, const OptionalTensor& weight_in,
                        const OptionalTensor& bias_in, double eps) {
  STD_TORCH_CHECK(x.dim() >= 3, "x must have shape (B, C, *spatial), got ", shape_of(x));
  STD_TORCH_CHECK(eps >= 0, "eps must be at least 0, got ", eps);
  const int64_t channels = x.size(1);
  int64_t size = 1;
  for (int64_t i = 2; i < x.dim(); ++i) size *= x.size(i);
  const Widened weight(weight_in, "weight", {channels}), bias(bias_in, "bias", {channels});
  const float small = static_cast<float>(eps);
  if (is_bf16(x, "x"))
    return channel_norm_on<Bf16>(
        bf16_input(x, "x"), {nullptr, nullptr, weight.data(), bias.data(), channels, size, small});
  return channel_norm_on<float>(
      float_input(x, "x"), {nullptr, nullptr, weight.data(), bias.data(), channels, size, small});
}

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) {
  m.impl("channel_norm", TORCH_BOX(&fxprune::channel_norm_cpu));
}
