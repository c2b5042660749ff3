// The operators of the fxprune library: schemas, checks, and the hand-over to the kernels. Built
// against torch's stable ABI, so that one binary serves every torch from 2.11 on.
#include <algorithm>
#include <vector>

#include "check.h"
#include "fxprune/kernels.h"
#include "fxprune/tile_pack.h"
#include "parallel.h"
#include "run.h"
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

// Checks x and the window arguments that depthwise_taps and tile_conv share and fills them in.
template <typename Args>
void check_window(const Tensor& x, const IntList& kernel_size, const IntList& stride,
                  const IntList& padding, const IntList& dilation, const Text& activation,
                  Args* a) {
  check_pair(kernel_size, "kernel_size", 1);
  check_pair(stride, "stride", 1);
  check_pair(padding, "padding", 0);
  check_pair(dilation, "dilation", 1);
  a->activation = check_activation(activation);
  check_tensor(x, "x", element_types().float32, "float32");
  STD_TORCH_CHECK(x.dim() == 4, "x must have shape (B, C, H, W), got ", shape_of(x));
  a->batch = x.size(0), a->channels = x.size(1), a->height = x.size(2), a->width = x.size(3);
  a->kernel_h = kernel_size[0], a->kernel_w = kernel_size[1];
  a->stride_h = stride[0], a->stride_w = stride[1];
  a->pad_h = padding[0], a->pad_w = padding[1];
  a->dilation_h = dilation[0], a->dilation_w = dilation[1];
}

// ---- depthwise_taps ----

Tensor depthwise_taps_cpu(const Tensor& x_in, const Tensor& weight_in, const Tensor& taps_in,
                          const OptionalTensor& bias_in, const IntList& kernel_size,
                          const IntList& stride, const IntList& padding, const IntList& dilation,
                          const Text& activation) {
  DepthwiseTaps a{};
  check_window(x_in, kernel_size, stride, padding, dilation, activation, &a);
  const Tensor taps = check_taps(weight_in, taps_in, &a);
  const OptionalTensor bias = float_input(bias_in, "bias", {a.channels});
  const Tensor x = float_input(x_in, "x"), weight = float_input(weight_in, "weight");
  Tensor out = empty_output(x, {a.batch, a.channels, a.out_h, a.out_w});
  const int64_t planes = a.batch * a.channels;
  if (planes == 0) return out;
  a.x = data<float>(x);
  a.weight = data<float>(weight);
  a.bias = data_or_null(bias);
  a.out = static_cast<float*>(out.mutable_data_ptr());

  const DepthwiseTables tables(&a);
  run_depthwise(a, threads());
  return out;
}

// ---- tile_gemm ----

Tensor tile_gemm_cpu(const Tensor& x_in, const Tensor& values_in, const Tensor& index,
                     const Tensor& tile_ptr, const Tensor& columns, const OptionalTensor& bias_in,
                     const OptionalTensor& residual_in, const OptionalTensor& gate_in,
                     int64_t out_features, int64_t granularity, int64_t feature_dim,
                     const Text& activation) {
  STD_TORCH_CHECK(feature_dim == 1 || feature_dim == -1, "feature_dim must be 1 or -1, got ",
                  feature_dim);
  TileGemm a{};
  a.activation = check_activation(activation);
  check_tensor(x_in, "x", element_types().float32, "float32");
  bool feature_major = feature_dim == 1;
  const int64_t rank = x_in.dim();
  STD_TORCH_CHECK(rank >= (feature_major ? 3 : 1), "x must have shape ",
                  feature_major ? "(B, K, *spatial) with at least one spatial dimension" : "(*, K)",
                  ", got ", shape_of(x_in));
  const int64_t axis = feature_major ? 1 : rank - 1;
  const TileStructure structure(index, tile_ptr, columns, granularity, out_features,
                                x_in.size(axis), &a);
  check_shape(values_in, "values", {structure.values});
  std::vector<int64_t> shape(rank);
  for (int64_t i = 0; i < rank; ++i) shape[i] = i == axis ? out_features : x_in.size(i);
  const OptionalTensor bias = float_input(bias_in, "bias", {out_features});
  const OptionalTensor residual = float_input(residual_in, "residual", shape);
  STD_TORCH_CHECK(feature_major || !gate_in.has_value(), "gate needs feature_dim=1");
  const OptionalTensor gate =
      feature_major ? float_input(gate_in, "gate", {x_in.size(0), a.k}) : OptionalTensor();
  const Tensor x = float_input(x_in, "x"), values = float_input(values_in, "values");
  Tensor out = empty_output(x, shape);

  a.batch = feature_major ? x.size(0) : 1;
  a.m = 1;
  for (int64_t i = feature_major ? 2 : 0; i < (feature_major ? rank : rank - 1); ++i)
    a.m *= x.size(i);
  if (a.batch == 0 || a.m == 0 || a.n == 0) return out;
  if (feature_major && a.m == 1 && !gate.has_value()) {
    // One pixel an image: the same memory is row-major with the batch as rows, and vectors fill up.
    feature_major = false;
    std::swap(a.batch, a.m);
  }
  a.x = data<float>(x);
  a.values = data<float>(values);
  a.bias = data_or_null(bias);
  a.residual = data_or_null(residual);
  a.gate = data_or_null(gate);
  a.out = static_cast<float*>(out.mutable_data_ptr());

  run_tile_gemm(a, feature_major, structure.values, threads());
  return out;
}

// ---- tile_conv ----

Tensor tile_conv_cpu(const Tensor& x_in, const Tensor& values_in, const Tensor& index,
                     const Tensor& tile_ptr, const Tensor& columns, const OptionalTensor& bias_in,
                     const OptionalTensor& residual_in, int64_t out_features, int64_t granularity,
                     const IntList& kernel_size, const IntList& stride, const IntList& padding,
                     const IntList& dilation, int64_t groups, const Text& activation) {
  TileConv a{};
  check_window(x_in, kernel_size, stride, padding, dilation, activation, &a);
  a.groups = groups;
  const TileStructure structure =
      check_conv(index, tile_ptr, columns, granularity, out_features, &a);
  check_shape(values_in, "values", {structure.values});
  const std::vector<int64_t> shape = {a.batch, a.n, a.out_h, a.out_w};
  const OptionalTensor bias = float_input(bias_in, "bias", {out_features});
  const OptionalTensor residual = float_input(residual_in, "residual", shape);
  const Tensor x = float_input(x_in, "x"), values = float_input(values_in, "values");
  Tensor out = empty_output(x, shape);
  if (a.batch == 0 || a.n == 0) return out;
  a.x = data<float>(x);
  a.values = data<float>(values);
  a.bias = data_or_null(bias);
  a.residual = data_or_null(residual);
  a.out = static_cast<float*>(out.mutable_data_ptr());

  const ConvTables tables(&a);
  STD_TORCH_CHECK(tables.fits(),
                  "the rows of x that one output row reads are too large, x has shape ",
                  shape_of(x_in));
  run_tile_conv(a, threads());
  return out;
}

// ---- tile_pack, tile_unpack ----

Tensor tile_pack_cpu(const Tensor& weight_in, const Tensor& index, const Tensor& tile_ptr,
                     const Tensor& columns, int64_t granularity, int64_t nnz) {
  check_tensor(weight_in, "weight", element_types().float32, "float32");
  STD_TORCH_CHECK(weight_in.dim() == 2, "weight must have shape (N, K), got ", shape_of(weight_in));
  TileGemm a{};
  const TileStructure structure(index, tile_ptr, columns, granularity, weight_in.size(0),
                                weight_in.size(1), &a);
  STD_TORCH_CHECK(nnz == structure.values, "nnz must be ", structure.values,
                  ", the packed values, got ", nnz);
  const Tensor weight = float_input(weight_in, "weight");
  Tensor values = empty_output(weight, {nnz});
  const float* from = data<float>(weight);
  float* to = static_cast<float*>(values.mutable_data_ptr());
  for_each_kept(a, [&](int64_t dense, int64_t at) { to[at] = from[dense]; });
  return values;
}

Tensor tile_unpack_cpu(const Tensor& values_in, const Tensor& index, const Tensor& tile_ptr,
                       const Tensor& columns, int64_t granularity, int64_t out_features,
                       int64_t in_features) {
  TileGemm a{};
  const TileStructure structure(index, tile_ptr, columns, granularity, out_features, in_features,
                                &a);
  check_shape(values_in, "values", {structure.values});
  const Tensor values = float_input(values_in, "values");
  Tensor weight = empty_output(values, {out_features, in_features});
  torch::stable::zero_(weight);
  const float* from = data<float>(values);
  float* to = static_cast<float*>(weight.mutable_data_ptr());
  for_each_kept(a, [&](int64_t dense, int64_t at) { to[dense] = from[at]; });
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
      "tile_pack(Tensor weight, Tensor index, Tensor tile_ptr, Tensor columns, int granularity, "
      "int nnz) -> Tensor");
  m.def(
      "tile_unpack(Tensor values, Tensor index, Tensor tile_ptr, Tensor columns, int granularity, "
      "int out_features, "
      "int in_features) -> Tensor");
  m.def("region(Tensor[] x, Tensor[] packed, int[] program, int[] outputs) -> Tensor[]");
  m.def(
      "rnn_steps(Tensor gates, Tensor h, Tensor? c, Tensor values, Tensor index, Tensor tile_ptr, "
      "Tensor columns, Tensor? bias, int granularity, bool reverse) -> Tensor[]");
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
