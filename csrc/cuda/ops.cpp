// The CUDA side of the fxprune library: checks, and the hand-over to the kernels. Built against
// torch's stable ABI and without a dependency on CUDA's libraries, so that it loads beside any
// torch. The schemas are those of csrc/ops.cpp.
//
// Index lists are not checked here: that would read them back. They are checked when they are
// packed (Pattern.check), and the planner packs on the host.
#include <algorithm>
#include <cstdlib>
#include <string>

#include "cuda/parts.h"

namespace fxprune::cuda_ops {

using gpu::Element;

namespace {

// The depthwise convolution; with `mean`, also that of its planes.
Tensor depthwise(const Tensor& x_in, const Tensor& weight_in, const Tensor& taps_in,
                 const OptionalTensor& bias_in, const IntList& kernel_size, const IntList& stride,
                 const IntList& padding, const IntList& dilation, const Text& activation,
                 OptionalTensor* mean) {
  const auto g = check_image<DepthwiseTaps>(x_in, kernel_size, stride, padding, dilation);
  const Element element = check_element(x_in);
  const int64_t words = (g.kernel() + 63) / 64;
  check_shape(weight_in, "weight", {g.channels, g.kernel()});
  check_shape(taps_in, "taps", {g.channels, words});
  const Activation chosen = check_activation(activation);
  const OptionalTensor bias = like_input(bias_in, "bias", x_in, {g.channels});
  const Tensor x = like_input(x_in, "x", x_in), weight = like_input(weight_in, "weight", x_in),
               taps = list_input(taps_in, "taps", x_in, element_types().int64, "int64");
  Tensor out = empty_like(x, {g.batch, g.channels, g.out_h, g.out_w}, type_of(x));
  if (mean != nullptr) *mean = empty_like(x, {g.batch, g.channels}, type_of(x));
  if (out.numel() == 0) return out;

  gpu::DepthwiseArgs a{};
  a.x = x.const_data_ptr();
  a.weight = weight.const_data_ptr();
  a.taps = static_cast<const uint64_t*>(taps.const_data_ptr());
  a.bias = address(bias);
  a.out = out.mutable_data_ptr();
  copy_sizes(g, &a);
  a.tap_words = small_size(words, "kernel_size");
  small_size(g.kernel(), "kernel_size");
  copy_windows(g, &a);
  a.activation = chosen;
  const OnDeviceOf guard(x);
  void* const stream = current_stream(x);
  if (mean == nullptr) {
    gpu::depthwise_taps_cuda(a, element, stream);
    return out;
  }
  Tensor sums = empty_like(x, {g.batch, g.channels, gpu::pool_parts(a)}, element_types().float32);
  a.pool = static_cast<float*>(sums.mutable_data_ptr());
  gpu::depthwise_pool_cuda(a, element, (*mean)->mutable_data_ptr(), stream);
  return out;
}

}  // namespace

Tensor depthwise_taps(const Tensor& x, const Tensor& weight, const Tensor& taps,
                      const OptionalTensor& bias, const IntList& kernel_size, const IntList& stride,
                      const IntList& padding, const IntList& dilation, const Text& activation) {
  return depthwise(x, weight, taps, bias, kernel_size, stride, padding, dilation, activation,
                   nullptr);
}

std::vector<Tensor> depthwise_pool(const Tensor& x, const Tensor& weight, const Tensor& taps,
                                   const OptionalTensor& bias, const IntList& kernel_size,
                                   const IntList& stride, const IntList& padding,
                                   const IntList& dilation, const Text& activation) {
  OptionalTensor mean;
  const Tensor y =
      depthwise(x, weight, taps, bias, kernel_size, stride, padding, dilation, activation, &mean);
  return {y, *mean};
}

Tensor transposed(const Tensor& x, int64_t rows, int64_t columns, Element element, void* stream) {
  Tensor out = empty_like(x, {columns, rows}, type_of(x));
  gpu::transpose_cuda({x.const_data_ptr(), out.mutable_data_ptr(), rows, columns},
                      element == Element::kFloat ? 4 : 2, stream);
  return out;
}

// For debugging: FXPRUNE_CUDA_ISA=sm_80 leaves the kernels for newer GPUs unused.
bool newest_kernels() {
  static const bool newest = [] {
    const char* cap = std::getenv("FXPRUNE_CUDA_ISA");
    return cap == nullptr || std::string(cap) != "sm_80";
  }();
  return newest;
}

Tensor tile_gemm(const Tensor& x_in, const Tensor& values_in, const Tensor& index,
                 const Tensor& tile_ptr, const Tensor& columns, const OptionalTensor& bias_in,
                 const OptionalTensor& residual_in, const OptionalTensor& gate_in,
                 int64_t out_features, int64_t granularity, int64_t feature_dim,
                 const Text& activation) {
  STD_TORCH_CHECK(feature_dim == 1 || feature_dim == -1, "feature_dim must be 1 or -1, got ",
                  feature_dim);
  const bool feature_major = feature_dim == 1;
  check_cuda_tensor(x_in, "x");
  const Element element = check_element(x_in);
  const int64_t rank = x_in.dim();
  STD_TORCH_CHECK(rank >= (feature_major ? 3 : 1), "x must have shape ",
                  feature_major ? "(B, K, *spatial) with at least one spatial dimension" : "(*, K)",
                  ", got ", shape_of(x_in));
  STD_TORCH_CHECK(out_features >= 0, "out_features must not be negative, got ", out_features);
  STD_TORCH_CHECK(feature_major || !gate_in.has_value(), "gate needs feature_dim=1");
  const Structure structure(index, tile_ptr, columns, granularity, x_in);
  structure.check_features(out_features);
  PackedValues weights(values_in, structure, x_in, true);
  const int64_t axis = feature_major ? 1 : rank - 1;
  std::vector<int64_t> shape(rank);
  for (int64_t i = 0; i < rank; ++i) shape[i] = i == axis ? out_features : x_in.size(i);

  gpu::TileGemmArgs a{};
  a.activation = check_activation(activation);
  a.k = x_in.size(axis);
  a.n = out_features;
  a.rows = structure.rows;
  a.batch = feature_major ? x_in.size(0) : 1;
  a.m = 1;
  for (int64_t i = feature_major ? 2 : 0; i < (feature_major ? rank : axis); ++i) {
    a.m *= x_in.size(i);
  }
  const OptionalTensor bias = like_input(bias_in, "bias", x_in, {out_features});
  OptionalTensor residual = like_input(residual_in, "residual", x_in, shape);
  const OptionalTensor gate = like_input(gate_in, "gate", x_in, {x_in.size(0), a.k});
  Tensor x = like_input(x_in, "x", x_in);
  Tensor out = empty_like(x, shape, type_of(x));
  if (out.numel() == 0) return out;
  structure.fill(&a);

  const OnDeviceOf guard(x);
  void* const stream = current_stream(x);
  weights.fill(&a, stream);
  OptionalTensor result;
  if (!feature_major) {
    x = transposed(x, a.m, a.k, element, stream);
    if (residual.has_value()) residual = transposed(*residual, a.m, a.n, element, stream);
    result = empty_like(x, {a.n, a.m}, type_of(x));
  }
  a.x = x.const_data_ptr();
  a.bias = address(bias);
  a.residual = address(residual);
  a.gate = address(gate);
  a.out = (feature_major ? out : *result).mutable_data_ptr();
  gpu::tile_gemm_cuda(a, element, newest_kernels(), stream);
  if (!feature_major) {
    gpu::transpose_cuda({result->const_data_ptr(), out.mutable_data_ptr(), a.n, a.m},
                        element == Element::kFloat ? 4 : 2, stream);
  }
  return out;
}

Tensor pack(const Tensor& from_in, const Structure& structure, int64_t k, Tensor out, bool unpack) {
  const Tensor from = like_input(from_in, unpack ? "values" : "weight", from_in);
  const Element element = check_element(from);
  gpu::TilePackArgs a{};
  structure.fill(&a);
  a.k = k;
  a.from = from.const_data_ptr();
  a.to = out.mutable_data_ptr();
  const OnDeviceOf guard(from);
  if (out.numel() > 0 && from.numel() > 0) {
    gpu::tile_pack_cuda(a, structure.rows, element == Element::kFloat ? 4 : 2, unpack,
                        current_stream(from));
  }
  return out;
}

Tensor tile_pack(const Tensor& weight, const Tensor& index, const Tensor& tile_ptr,
                 const Tensor& columns, int64_t granularity, int64_t nnz) {
  check_cuda_tensor(weight, "weight");
  STD_TORCH_CHECK(weight.dim() == 2, "weight must have shape (N, K), got ", shape_of(weight));
  const Structure structure(index, tile_ptr, columns, granularity, weight);
  STD_TORCH_CHECK(nnz >= 0 && nnz <= structure.rows * structure.granularity, "nnz must be at most ",
                  structure.rows * structure.granularity, ", got ", nnz);
  Tensor out = empty_like(weight, {nnz}, type_of(weight));
  return pack(weight, structure, weight.size(1), out, false);
}

Tensor tile_unpack(const Tensor& values, const Tensor& index, const Tensor& tile_ptr,
                   const Tensor& columns, int64_t granularity, int64_t out_features,
                   int64_t in_features) {
  check_cuda_tensor(values, "values");
  const Structure structure(index, tile_ptr, columns, granularity, values);
  STD_TORCH_CHECK(out_features >= structure.kept && in_features >= 0,
                  "out_features must be at least the number of columns, got ", out_features);
  structure.check_values(values);
  Tensor out = empty_like(values, {out_features, in_features}, type_of(values));
  torch::stable::zero_(out);
  return pack(values, structure, in_features, out, true);
}

}  // namespace fxprune::cuda_ops

FXPRUNE_GPU_OPERATORS(m) {
  m.impl("depthwise_taps", TORCH_BOX(&fxprune::cuda_ops::depthwise_taps));
  m.impl("depthwise_pool", TORCH_BOX(&fxprune::cuda_ops::depthwise_pool));
  m.impl("tile_gemm", TORCH_BOX(&fxprune::cuda_ops::tile_gemm));
  m.impl("tile_pack", TORCH_BOX(&fxprune::cuda_ops::tile_pack));
  m.impl("tile_unpack", TORCH_BOX(&fxprune::cuda_ops::tile_unpack));
}
