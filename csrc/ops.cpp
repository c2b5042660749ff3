// The operators of the fxprune library: schemas, checks, and the hand-over to the kernels. Built
// against torch's stable ABI, so that one binary serves every torch from 2.11 on.
#include <algorithm>
#include <vector>

#include "check_packed.h"
#include "fxprune/kernels.h"
#include "fxprune/tile_pack.h"
#include "parallel.h"
#include "run.h"
#include "run_bf16.h"
#include "run_conv.h"

namespace fxprune {
namespace {

using IntList = std::vector<int64_t>;

int64_t threads() {
  return torch::stable::get_num_threads();
}

void check_pair(const IntList& v, const char* name, int64_t least) {
  STD_TORCH_CHECK(v.size() == 2, name, " must have 2 entries, got ", v.size());
  constexpr int64_t kMost = int64_t{1} << 20;  // keeps every product of these in range
  for (int64_t entry : v) {
    STD_TORCH_CHECK(entry >= least && entry <= kMost, name, " must lie in [", least, ", ", kMost,
                    "], got ", entry);
  }
}

// Checks the shape of x and the window arguments that depthwise_taps and tile_conv share and fills
// them in.
template <typename Args>
void check_window(const Tensor& x, const IntList& kernel_size, const IntList& stride,
                  const IntList& padding, const IntList& dilation, const Text& activation,
                  Args* a) {
  check_pair(kernel_size, "kernel_size", 1);
  check_pair(stride, "stride", 1);
  check_pair(padding, "padding", 0);
  check_pair(dilation, "dilation", 1);
  a->activation = check_activation(activation);
  STD_TORCH_CHECK(x.dim() == 4, "x must have shape (B, C, H, W), got ", shape_of(x));
  a->batch = x.size(0), a->channels = x.size(1), a->height = x.size(2), a->width = x.size(3);
  a->kernel_h = kernel_size[0], a->kernel_w = kernel_size[1];
  a->stride_h = stride[0], a->stride_w = stride[1];
  a->pad_h = padding[0], a->pad_w = padding[1];
  a->dilation_h = dilation[0], a->dilation_w = dilation[1];
}

// ---- depthwise_taps ----

template <class T>
void run_depthwise_on(const DepthwiseShape& shape, const Tensor& x, Tensor* out) {
  DepthwiseTapsOf<T> a{};
  static_cast<DepthwiseShape&>(a) = shape;
  const auto tables = depthwise_tables<T>(&a);
  a.x = data<T>(x);
  a.out = static_cast<T*>(out->mutable_data_ptr());
  run_depthwise(a, threads());
}

Tensor depthwise_taps_cpu(const Tensor& x_in, const Tensor& weight_in, const Tensor& taps_in,
                          const OptionalTensor& bias_in, const IntList& kernel_size,
                          const IntList& stride, const IntList& padding, const IntList& dilation,
                          const Text& activation) {
  DepthwiseShape a{};
  const bool bf16 = is_bf16(x_in, "x");
  check_window(x_in, kernel_size, stride, padding, dilation, activation, &a);
  check_window(&a);
  const Tensor taps = check_taps(weight_in, taps_in, &a);
  if (!bf16) check_floats(weight_in, "weight", bias_in, "bias");
  const Widened bias(bias_in, "bias", {a.channels}),
      weight(weight_in, "weight", {a.channels, a.kernel()});
  Tensor out = empty_output(x_in, {a.batch, a.channels, a.out_h, a.out_w});
  if (a.batch * a.channels == 0) return out;
  a.weight = weight.data();
  a.bias = bias.data();
  if (bf16) {
    run_depthwise_on<Bf16>(a, bf16_input(x_in, "x"), &out);
  } else {
    run_depthwise_on<float>(a, float_input(x_in, "x"), &out);
  }
  return out;
}

std::vector<Tensor> depthwise_pool_cpu(const Tensor& x, const Tensor& weight, const Tensor& taps,
                                       const OptionalTensor& bias, const IntList& kernel_size,
                                       const IntList& stride, const IntList& padding,
                                       const IntList& dilation, const Text& activation) {
  Tensor y =
      depthwise_taps_cpu(x, weight, taps, bias, kernel_size, stride, padding, dilation, activation);
  Tensor mean = empty_output(y, {y.size(0), y.size(1)});
  const int64_t planes = y.size(0) * y.size(1), size = y.size(2) * y.size(3);
  if (planes > 0 && is_bf16(y, "x")) {
    run_channel_mean(data<Bf16>(y), static_cast<Bf16*>(mean.mutable_data_ptr()), planes, size,
                     size);
  } else if (planes > 0) {
    run_channel_mean(data<float>(y), static_cast<float*>(mean.mutable_data_ptr()), planes, size,
                     size);
  }
  return {y, mean};
}

// ---- tile_gemm ----

Tensor tile_gemm_cpu(const Tensor& x_in, const Tensor& values_in, const Tensor& index,
                     const Tensor& tile_ptr, const Tensor& columns, const OptionalTensor& bias_in,
                     const OptionalTensor& residual_in, const OptionalTensor& gate_in,
                     int64_t out_features, int64_t granularity, int64_t feature_dim,
                     const Text& activation) {
  STD_TORCH_CHECK(feature_dim == 1 || feature_dim == -1, "feature_dim must be 1 or -1, got ",
                  feature_dim);
  TileShape a{};
  a.activation = check_activation(activation);
  const bool bf16 = is_bf16(x_in, "x");
  bool feature_major = feature_dim == 1;
  const int64_t rank = x_in.dim();
  STD_TORCH_CHECK(rank >= (feature_major ? 3 : 1), "x must have shape ",
                  feature_major ? "(B, K, *spatial) with at least one spatial dimension" : "(*, K)",
                  ", got ", shape_of(x_in));
  const int64_t axis = feature_major ? 1 : rank - 1;
  const TileTensors tiles(index, tile_ptr, columns);
  const int64_t nnz = check_tiles(tiles.lists(), granularity, out_features, x_in.size(axis), &a);
  std::vector<int64_t> shape(rank);
  for (int64_t i = 0; i < rank; ++i) shape[i] = i == axis ? out_features : x_in.size(i);
  STD_TORCH_CHECK(feature_major || !gate_in.has_value(), "gate needs feature_dim=1");
  if (!bf16) {
    check_shape(values_in, "values", {nnz});
    check_floats(values_in, "values", bias_in, "bias");
  }
  const Widened bias(bias_in, "bias", {out_features});
  const std::vector<int64_t> gates = {feature_major ? x_in.size(0) : 0, a.k};
  Tensor out = empty_output(x_in, shape);

  a.batch = feature_major ? x_in.size(0) : 1;
  a.m = 1;
  for (int64_t i = feature_major ? 2 : 0; i < (feature_major ? rank : rank - 1); ++i)
    a.m *= x_in.size(i);
  a.bias = bias.data();
  if (feature_major && a.m == 1 && !gate_in.has_value()) {
    // One pixel an image: the same memory is row-major with the batch as rows, and vectors fill up.
    feature_major = false;
    std::swap(a.batch, a.m);
  }
  const bool empty = a.batch == 0 || a.m == 0 || a.n == 0;
  if (bf16) {
    const TileImage values(values_in, nnz, a);
    const OptionalTensor residual = bf16_input(residual_in, "residual", shape),
                         gate = bf16_input(gate_in, "gate", gates);
    const Tensor x = bf16_input(x_in, "x");
    if (empty) return out;
    TileGemmBf16 g{a,
                   data<Bf16>(x),
                   values.data(),
                   data_or_null<Bf16>(residual),
                   data_or_null<Bf16>(gate),
                   static_cast<Bf16*>(out.mutable_data_ptr())};
    run_tile_gemm(g, feature_major, threads());
    return out;
  }
  const OptionalTensor residual = float_input(residual_in, "residual", shape),
                       gate = float_input(gate_in, "gate", gates);
  const Tensor x = float_input(x_in, "x"), values = float_input(values_in, "values");
  if (empty) return out;
  TileGemm g{a,
             data<float>(x),
             data<float>(values),
             data_or_null(residual),
             data_or_null(gate),
             static_cast<float*>(out.mutable_data_ptr())};
  run_tile_gemm(g, feature_major, threads());
  return out;
}

// ---- dsconv ----

// One after the other: what a CPU gains by fusing them, regions do.
Tensor dsconv_cpu(const Tensor& x, const Tensor& weight, const Tensor& taps,
                  const OptionalTensor& depthwise_bias, const Tensor& values, const Tensor& index,
                  const Tensor& tile_ptr, const Tensor& columns, const OptionalTensor& bias,
                  const OptionalTensor& residual, const IntList& kernel_size, const IntList& stride,
                  const IntList& padding, const IntList& dilation, int64_t out_features,
                  int64_t granularity, const Text& depthwise_activation, const Text& activation) {
  const Tensor between = depthwise_taps_cpu(x, weight, taps, depthwise_bias, kernel_size, stride,
                                            padding, dilation, depthwise_activation);
  return tile_gemm_cpu(between, values, index, tile_ptr, columns, bias, residual, std::nullopt,
                       out_features, granularity, 1, activation);
}

// ---- tile_conv ----

// a: complete but for the activations and the layout of their copy.
template <class T>
Tensor run_conv_on(TileConvOf<T>* a, const Tensor& x, const OptionalTensor& residual) {
  Tensor out = empty_output(x, {a->batch, a->n, a->out_h, a->out_w});
  if (a->batch == 0 || a->n == 0) return out;
  a->x = data<T>(x);
  a->residual = data_or_null<T>(residual);
  a->out = static_cast<T*>(out.mutable_data_ptr());
  const auto tables = conv_tables(a);
  STD_TORCH_CHECK(tables->fits(),
                  "the rows of x that one output row reads are too large, x has shape ",
                  shape_of(x));
  run_tile_conv(*a, threads());
  return out;
}

Tensor tile_conv_cpu(const Tensor& x_in, const Tensor& values_in, const Tensor& index,
                     const Tensor& tile_ptr, const Tensor& columns, const OptionalTensor& bias_in,
                     const OptionalTensor& residual_in, int64_t out_features, int64_t granularity,
                     const IntList& kernel_size, const IntList& stride, const IntList& padding,
                     const IntList& dilation, int64_t groups, const Text& activation) {
  if (is_bf16(x_in, "x")) {
    TileConvBf16 a{};
    check_window(x_in, kernel_size, stride, padding, dilation, activation, &a);
    a.groups = groups;
    const TileTensors tiles(index, tile_ptr, columns);
    const int64_t nnz = check_conv(tiles.lists(), granularity, out_features, &a);
    const TileImage values(values_in, nnz, a);
    const Widened bias(bias_in, "bias", {out_features});
    a.values = values.data();
    a.bias = bias.data();
    return run_conv_on(&a, bf16_input(x_in, "x"),
                       bf16_input(residual_in, "residual", {a.batch, a.n, a.out_h, a.out_w}));
  }
  TileConv a{};
  check_window(x_in, kernel_size, stride, padding, dilation, activation, &a);
  a.groups = groups;
  const TileTensors tiles(index, tile_ptr, columns);
  check_shape(values_in, "values", {check_conv(tiles.lists(), granularity, out_features, &a)});
  const OptionalTensor bias = float_input(bias_in, "bias", {out_features});
  const Tensor values = float_input(values_in, "values");
  a.values = data<float>(values);
  a.bias = data_or_null(bias);
  return run_conv_on(&a, float_input(x_in, "x"),
                     float_input(residual_in, "residual", {a.batch, a.n, a.out_h, a.out_w}));
}

// ---- tile_pack, tile_unpack ----

template <class T>
void pack(const TileShape& a, const Tensor& weight, Tensor* values) {
  const T* from = data<T>(weight);
  T* to = static_cast<T*>(values->mutable_data_ptr());
  for_each_kept(a, [&](int64_t dense, int64_t at) { to[at] = from[dense]; });
}

template <class T>
void unpack(const TileShape& a, const Tensor& values, Tensor* weight) {
  const T* from = data<T>(values);
  T* to = static_cast<T*>(weight->mutable_data_ptr());
  for_each_kept(a, [&](int64_t dense, int64_t at) { to[dense] = from[at]; });
}

Tensor tile_pack_cpu(const Tensor& weight_in, const Tensor& index, const Tensor& tile_ptr,
                     const Tensor& columns, int64_t granularity, int64_t nnz) {
  const bool bf16 = is_bf16(weight_in, "weight");
  STD_TORCH_CHECK(weight_in.dim() == 2, "weight must have shape (N, K), got ", shape_of(weight_in));
  TileShape a{};
  const TileTensors tiles(index, tile_ptr, columns);
  const int64_t kept =
      check_tiles(tiles.lists(), granularity, weight_in.size(0), weight_in.size(1), &a);
  STD_TORCH_CHECK(nnz == kept, "nnz must be ", kept, ", the packed values, got ", nnz);
  const Tensor weight = bf16 ? bf16_input(weight_in, "weight") : float_input(weight_in, "weight");
  Tensor values = empty_output(weight, {nnz});
  bf16 ? pack<Bf16>(a, weight, &values) : pack<float>(a, weight, &values);
  return values;
}

Tensor tile_unpack_cpu(const Tensor& values_in, const Tensor& index, const Tensor& tile_ptr,
                       const Tensor& columns, int64_t granularity, int64_t out_features,
                       int64_t in_features) {
  TileShape a{};
  const TileTensors tiles(index, tile_ptr, columns);
  check_shape(values_in, "values",
              {check_tiles(tiles.lists(), granularity, out_features, in_features, &a)});
  const bool bf16 = is_bf16(values_in, "values");
  const Tensor values = bf16 ? bf16_input(values_in, "values") : float_input(values_in, "values");
  Tensor weight = empty_output(values, {out_features, in_features});
  torch::stable::zero_(weight);
  bf16 ? unpack<Bf16>(a, values, &weight) : unpack<float>(a, values, &weight);
  return weight;
}

// ---- the ISA in use ----

std::string isa() {
  return kernels().isa;
}

void choose_isa(const Text& name) {
  STD_TORCH_CHECK(set_isa(name.value), "ISA '", name.value,
                  "' is unknown or not supported by this machine");
}

#ifdef FXPRUNE_SANITIZE
// Reads one element past the end of x, so that a run under a sanitizer can prove that the sanitizer
// is on.
Tensor asan_canary(const Tensor& x_in) {
  const Tensor x = float_input(x_in, "x");
  Tensor out = empty_output(x, {1});
  const volatile float* p = data<float>(x);
  static_cast<float*>(out.mutable_data_ptr())[0] = p[x.numel()];
  return out;
}
#endif

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY(fxprune, m) {
  m.def(
      "depthwise_taps(Tensor x, Tensor weight, Tensor taps, Tensor? bias, int[] kernel_size, int[] "
      "stride, "
      "int[] padding, int[] dilation, str activation=\"none\") -> Tensor");
  m.def(
      "tile_gemm(Tensor x, Tensor values, Tensor index, Tensor tile_ptr, Tensor columns, Tensor? "
      "bias, "
      "Tensor? residual, Tensor? gate, int out_features, int granularity, int feature_dim, "
      "str activation=\"none\") -> Tensor");
  m.def(
      "tile_conv(Tensor x, Tensor values, Tensor index, Tensor tile_ptr, Tensor columns, Tensor? "
      "bias, Tensor? residual, int out_features, int granularity, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation, int groups, str activation=\"none\") -> Tensor");
  m.def(
      "depthwise_pool(Tensor x, Tensor weight, Tensor taps, Tensor? bias, int[] kernel_size, int[] "
      "stride, int[] padding, int[] dilation, str activation=\"none\") -> Tensor[]");
  m.def("channel_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor");
  m.def("attention(Tensor q, Tensor k, Tensor v, Tensor? mask, int heads, float scale) -> Tensor");
  m.def("attention_rows(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor");
  m.def(
      "depthwise_grad_input(Tensor grad, Tensor weight, Tensor taps, int[] size, int[] "
      "kernel_size, int[] stride, int[] padding, int[] dilation) -> Tensor");
  m.def(
      "depthwise_grad_weight(Tensor grad, Tensor x, Tensor taps, int[] kernel_size, int[] stride, "
      "int[] padding, int[] dilation) -> Tensor");
  m.def(
      "tile_grad_input(Tensor grad, Tensor values, Tensor index, Tensor tile_ptr, Tensor columns, "
      "int granularity, int in_features, int feature_dim) -> Tensor");
  m.def(
      "tile_grad_weight(Tensor grad, Tensor x, Tensor index, Tensor tile_ptr, Tensor columns, "
      "int granularity, int nnz, int feature_dim) -> Tensor");
  m.def(
      "tile_conv_grad_input(Tensor grad, Tensor values, Tensor index, Tensor tile_ptr, Tensor "
      "columns, "
      "int granularity, int in_channels, int[] size, int[] kernel_size, int[] stride, int[] "
      "padding, int[] dilation, int groups) -> Tensor");
  m.def(
      "tile_conv_grad_weight(Tensor grad, Tensor x, Tensor index, Tensor tile_ptr, Tensor columns, "
      "int granularity, int nnz, int[] kernel_size, int[] stride, int[] padding, int[] dilation, "
      "int groups) -> Tensor");
  m.def(
      "dsconv(Tensor x, Tensor weight, Tensor taps, Tensor? depthwise_bias, Tensor values, Tensor "
      "index, Tensor tile_ptr, Tensor columns, Tensor? bias, Tensor? residual, int[] kernel_size, "
      "int[] stride, int[] padding, int[] dilation, int out_features, int granularity, "
      "str depthwise_activation=\"none\", str activation=\"none\") -> Tensor");
  m.def(
      "tile_pack(Tensor weight, Tensor index, Tensor tile_ptr, Tensor columns, int granularity, "
      "int nnz) -> Tensor");
  m.def(
      "tile_unpack(Tensor values, Tensor index, Tensor tile_ptr, Tensor columns, int granularity, "
      "int out_features, "
      "int in_features) -> Tensor");
  m.def(
      "region(Tensor[] x, Tensor[] weights, str layout, str program, int[] outputs) -> "
      "Tensor[]");
  m.def(
      "rnn_steps(Tensor gates, Tensor h, Tensor? c, Tensor values, Tensor index, Tensor tile_ptr, "
      "Tensor columns, Tensor? bias, int granularity, bool reverse) -> Tensor[]");
  m.def("nm_mm(Tensor x, Tensor weight) -> Tensor");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> ()");
#ifdef FXPRUNE_SANITIZE
  m.def("asan_canary(Tensor x) -> Tensor");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) {
  m.impl("depthwise_taps", TORCH_BOX(&fxprune::depthwise_taps_cpu));
  m.impl("tile_gemm", TORCH_BOX(&fxprune::tile_gemm_cpu));
  m.impl("tile_conv", TORCH_BOX(&fxprune::tile_conv_cpu));
  m.impl("depthwise_pool", TORCH_BOX(&fxprune::depthwise_pool_cpu));
  m.impl("dsconv", TORCH_BOX(&fxprune::dsconv_cpu));
  m.impl("tile_pack", TORCH_BOX(&fxprune::tile_pack_cpu));
  m.impl("tile_unpack", TORCH_BOX(&fxprune::tile_unpack_cpu));
#ifdef FXPRUNE_SANITIZE
  m.impl("asan_canary", TORCH_BOX(&fxprune::asan_canary));
#endif
}

STABLE_TORCH_LIBRARY_IMPL(fxprune, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&fxprune::isa));
  m.impl("set_isa", TORCH_BOX(&fxprune::choose_isa));
}
