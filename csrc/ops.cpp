// The operators of the fxprune library: schemas, checks, and the hand-over to the kernels. Built
// against torch's stable ABI, so that one binary serves every torch from 2.11 on.
#include <algorithm>
#include <vector>

#include "check.h"
#include "fxprune/kernels.h"
#include "fxprune/tile_pack.h"
#include "parallel.h"

namespace fxprune {
namespace {

using IntList = std::vector<int64_t>;

int64_t threads() {
  return torch::stable::get_num_threads();
}

// ---- depthwise_taps ----

void check_pair(const IntList& v, const char* name, int64_t least) {
  STD_TORCH_CHECK(v.size() == 2, name, " must have 2 entries, got ", v.size());
  constexpr int64_t kMost = int64_t{1} << 20;  // keeps every product of these in range
  for (int64_t entry : v) {
    STD_TORCH_CHECK(entry >= least && entry <= kMost, name, " must lie in [", least, ", ", kMost,
                    "], got ", entry);
  }
}

Tensor depthwise_taps_cpu(const Tensor& x_in, const Tensor& weight_in, const Tensor& taps_in,
                          const OptionalTensor& bias_in, const IntList& kernel_size,
                          const IntList& stride, const IntList& padding, const IntList& dilation,
                          const Text& activation) {
  check_pair(kernel_size, "kernel_size", 1);
  check_pair(stride, "stride", 1);
  check_pair(padding, "padding", 0);
  check_pair(dilation, "dilation", 1);
  DepthwiseTaps a{};
  a.activation = check_activation(activation);
  check_tensor(x_in, "x", element_types().float32, "float32");
  STD_TORCH_CHECK(x_in.dim() == 4, "x must have shape (B, C, H, W), got ", shape_of(x_in));
  a.batch = x_in.size(0), a.channels = x_in.size(1), a.height = x_in.size(2),
  a.width = x_in.size(3);
  a.kernel_h = kernel_size[0], a.kernel_w = kernel_size[1];
  a.stride_h = stride[0], a.stride_w = stride[1];
  a.pad_h = padding[0], a.pad_w = padding[1];
  a.dilation_h = dilation[0], a.dilation_w = dilation[1];
  a.tap_words = (a.kernel() + 63) / 64;
  check_shape(weight_in, "weight", {a.channels, a.kernel()});
  check_tensor(taps_in, "taps", element_types().int64, "int64");
  check_shape(taps_in, "taps", {a.channels, a.tap_words});
  const OptionalTensor bias = float_input(bias_in, "bias", {a.channels});
  const int64_t reach_h = a.height + 2 * a.pad_h - a.dilation_h * (a.kernel_h - 1) - 1;
  const int64_t reach_w = a.width + 2 * a.pad_w - a.dilation_w * (a.kernel_w - 1) - 1;
  STD_TORCH_CHECK(reach_h >= 0 && reach_w >= 0, "x of shape ", shape_of(x_in),
                  " is smaller than the dilated window (", a.dilation_h * (a.kernel_h - 1) + 1,
                  ", ", a.dilation_w * (a.kernel_w - 1) + 1, ") with padding (", a.pad_h, ", ",
                  a.pad_w, ")");
  a.out_h = reach_h / a.stride_h + 1;
  a.out_w = reach_w / a.stride_w + 1;
  const Tensor x = float_input(x_in, "x"), weight = float_input(weight_in, "weight");
  const Tensor taps = taps_in.is_contiguous() ? taps_in : torch::stable::contiguous(taps_in);
  a.taps = reinterpret_cast<const uint64_t*>(data<int64_t>(taps));
  if (const int64_t used = a.kernel() % 64; used != 0) {
    for (int64_t c = 0; c < a.channels; ++c) {
      const uint64_t last = a.taps[c * a.tap_words + a.tap_words - 1];
      STD_TORCH_CHECK(last >> used == 0, "taps of channel ", c, " set a bit past tap ",
                      a.kernel() - 1);
    }
  }
  Tensor out = empty_output(x, {a.batch, a.channels, a.out_h, a.out_w});
  const int64_t planes = a.batch * a.channels;
  if (planes == 0) return out;
  a.x = data<float>(x);
  a.weight = data<float>(weight);
  a.bias = data_or_null(bias);
  a.out = static_cast<float*>(out.mutable_data_ptr());

  const Kernels& k = kernels();
  std::vector<uint32_t> masks;
  std::vector<TapSite> sites;
  std::vector<float> zeros;
  if (a.vectorised()) {
    masks.resize(depthwise_mask_count(a, k.width));
    sites.resize(a.kernel());
    zeros.resize(a.width);
    depthwise_sites(a, k.width, sites.data(), masks.data());
  }
  a.sites = sites.data();
  a.zeros = zeros.data();
  // Few images of large planes are cut in bands, one a thread, as the pointwise GEMMs around cut
  // their pixels: each core then reads what it wrote. Small planes, or enough images, are cut by
  // plane.
  constexpr int64_t kLargePlane = 24 * 24;
  const bool banded = a.vectorised() && a.batch < threads() && a.out_h * a.out_w >= kLargePlane;
  const int64_t length = band_length(a, k.width), bands = banded ? std::min(threads(), length) : 1;
  // Eight units a thread: enough to even out a busy core, few enough to keep planes together.
  const int64_t chunks = std::min(planes, (threads() * 8 + bands - 1) / bands);
  for_each_unit(bands * chunks, threads(), [&](int64_t unit) {
    static thread_local std::vector<Tap> list;
    if (static_cast<int64_t>(list.size()) < a.kernel()) list.resize(a.kernel());
    const int64_t band = unit / chunks, chunk = unit % chunks;
    const PlaneSpan span = {planes * chunk / chunks, planes * (chunk + 1) / chunks,
                            length * band / bands, length * (band + 1) / bands};
    k.depthwise_taps(a, span, list.data());
  });
  return out;
}

// ---- tile_gemm ----

// Feature-major: pixels are cut first. Where an image has too few of them, tiles are cut as well,
// and then a unit takes every pixel of its image, so that its weights are read once.
TileGrid feature_major_grid(const TileGemm& a, const Kernels& k) {
  const int64_t vecs = (a.m + k.width - 1) / k.width, pool = threads();
  TileGrid g{a.batch, vecs, vecs, 1, 1};
  if (pool == 1) return g;
  const int64_t blocks = (vecs + k.tile_vecs - 1) / k.tile_vecs;
  if (a.batch * blocks >= 8 * pool) {
    const int64_t each = std::max<int64_t>(1, a.batch * blocks / (8 * pool));
    g.step = std::min(vecs, each * k.tile_vecs);
    g.length_parts = (vecs + g.step - 1) / g.step;
  } else {
    g.tile_parts =
        std::clamp<int64_t>((4 * pool + a.batch - 1) / a.batch, 1, std::max<int64_t>(a.tiles, 1));
  }
  return g;
}

// Row-major: a panel of rows should stay in L2 while every tile passes over it, but each panel
// reads all weights anew, so it takes most of that cache. Few rows: tiles are cut.
TileGrid row_major_grid(const TileGemm& a) {
  constexpr int64_t kPanel = 384 * 1024;  // floats
  const int64_t pool = threads();
  TileGrid g{1, a.m, std::clamp<int64_t>(kPanel / std::max<int64_t>(a.k, 1), 24, 384), 1, 1};
  g.length_parts = (a.m + g.step - 1) / g.step;
  g.step = (a.m + g.length_parts - 1) / g.length_parts;
  if (pool > 1 && g.length_parts < 4 * pool) {
    g.tile_parts = std::clamp<int64_t>(4 * pool / g.length_parts, 1, std::max<int64_t>(a.tiles, 1));
  }
  return g;
}

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

  const Kernels& k = kernels();
  const TileGrid grid = feature_major ? feature_major_grid(a, k) : row_major_grid(a);
  const auto kernel = feature_major ? k.tile_gemm_feature_major : k.tile_gemm_row_major;
  for_each_unit(grid.units(), threads(), [&](int64_t unit) {
    kernel(a, tile_unit(a, grid, unit), a.gate ? scratch(structure.values) : nullptr);
  });
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
      "tile_pack(Tensor weight, Tensor index, Tensor tile_ptr, Tensor columns, int granularity, "
      "int nnz) -> Tensor");
  m.def(
      "tile_unpack(Tensor values, Tensor index, Tensor tile_ptr, Tensor columns, int granularity, "
      "int out_features, "
      "int in_features) -> Tensor");
  m.def("isa() -> str");
  m.def("set_isa(str name) -> ()");
#ifdef FXPRUNE_SANITIZE
  m.def("asan_canary(Tensor x) -> Tensor");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) {
  m.impl("depthwise_taps", TORCH_BOX(&fxprune::depthwise_taps_cpu));
  m.impl("tile_gemm", TORCH_BOX(&fxprune::tile_gemm_cpu));
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
