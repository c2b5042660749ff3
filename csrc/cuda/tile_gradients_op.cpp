// The gradients of fxprune::tile_gemm and tile_conv on the GPU: checks, and the hand-over to the
// kernels. Feature-major; row-major ones are transposed on the way.
#include "cuda/parts.h"

namespace fxprune::cuda_ops {
namespace {

using gpu::Element;
using gpu::TileGradientArgs;

// The structure's part of the arguments. Entries of pieces hold a row beside a channel in 32 bits.
TileGradientArgs gradient_args(const Structure& structure, int64_t k) {
  STD_TORCH_CHECK(k <= int64_t{1} << 24, "K must be at most 2**24, got ", k);
  TileGradientArgs a{};
  structure.fill(&a.gemm);
  a.gemm.rows = structure.rows;
  a.gemm.k = k;
  return a;
}

// Sets sizes of a feature-major tensor (B, N, *) whose features the structure's columns number.
void set_features(const Tensor& grad, const Structure& structure, gpu::TileGemmArgs* g) {
  g->batch = grad.size(0), g->n = grad.size(1), g->m = 1;
  for (int64_t i = 2; i < grad.dim(); ++i) g->m *= grad.size(i);
  structure.check_features(g->n);
}

// All of `a` but weights, results and room is set.
void run_input(TileGradientArgs a, const Tensor& grad, PackedValues& weights, Element element,
               void* out, void* stream) {
  weights.fill(&a.gemm, stream);
  const Tensor pieces =
                   empty_like(grad, {a.piece_count() * gpu::kPieceRows}, element_types().int32),
               counts = empty_like(grad, {a.piece_count()}, element_types().int32);
  a.pieces = static_cast<uint32_t*>(pieces.mutable_data_ptr());
  a.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  a.gemm.out = out;
  gpu::tile_grad_input_cuda(a, element, stream);
}

void run_weight(TileGradientArgs a, const Tensor& grad, Element element, const Tensor& out,
                void* stream) {
  a.nnz = out.numel();
  if (a.nnz == 0) return;
  const Tensor table = empty_like(grad, {a.gemm.layout().table_bytes() / 4}, element_types().int32);
  a.table = static_cast<int32_t*>(table.mutable_data_ptr());
  a.parts = 1;
  gpu::with_element(element, [&](auto t) { a.parts = gpu::weight_gradient_parts<decltype(t)>(a); });
  OptionalTensor partial;
  if (a.parts > 1) {
    partial = empty_like(grad, {a.parts, a.nnz}, element_types().float32);
    a.partial = static_cast<float*>(partial->mutable_data_ptr());
  }
  a.gemm.out = out.mutable_data_ptr();
  gpu::tile_grad_weight_cuda(a, element, stream);
}

// The number of rows and columns of a row-major tensor, features last.
struct Rows {
  int64_t count = 1, features;
  explicit Rows(const Tensor& t) : features(t.size(t.dim() - 1)) {
    for (int64_t i = 0; i + 1 < t.dim(); ++i) count *= t.size(i);
  }
};

bool check_layout(const Tensor& t, const char* name, int64_t feature_dim) {
  STD_TORCH_CHECK(feature_dim == 1 || feature_dim == -1, "feature_dim must be 1 or -1, got ",
                  feature_dim);
  check_cuda_tensor(t, name);
  STD_TORCH_CHECK(
      t.dim() >= (feature_dim == 1 ? 3 : 1), name, " must have shape ",
      feature_dim == 1 ? "(B, N, *spatial) with at least one spatial dimension" : "(*, N)",
      ", got ", shape_of(t));
  return feature_dim == 1;
}

// Fills in the sizes of grad, and returns it feature-major.
Tensor feature_major_of(const Tensor& grad, bool feature_major, const Structure& structure,
                        Element element, void* stream, gpu::TileGemmArgs* a) {
  if (feature_major) {
    set_features(grad, structure, a);
    return grad;
  }
  const Rows rows(grad);
  a->batch = 1, a->n = rows.features, a->m = rows.count;
  structure.check_features(a->n);
  return transposed(grad, a->m, a->n, element, stream);
}

Tensor tile_grad_input(const Tensor& grad_in, const Tensor& values, const Tensor& index,
                       const Tensor& tile_ptr, const Tensor& columns, int64_t granularity,
                       int64_t in_features, int64_t feature_dim) {
  const bool feature_major = check_layout(grad_in, "grad", feature_dim);
  const Element element = check_element(grad_in);
  STD_TORCH_CHECK(in_features >= 0, "in_features must not be negative, got ", in_features);
  const Structure structure(index, tile_ptr, columns, granularity, grad_in);
  PackedValues weights(values, structure, grad_in);
  TileGradientArgs a = gradient_args(structure, in_features);
  Tensor grad = like_input(grad_in, "grad", grad_in);
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < grad.dim(); ++i) shape.push_back(grad.size(i));
  shape[feature_major ? 1 : grad.dim() - 1] = in_features;
  Tensor out = empty_like(grad, shape, type_of(grad));
  if (out.numel() == 0) return out;
  const OnDeviceOf guard(grad);
  void* const stream = current_stream(grad);
  grad = feature_major_of(grad, feature_major, structure, element, stream, &a.gemm);
  OptionalTensor result;
  if (!feature_major) result = empty_like(grad, {in_features, a.gemm.m}, type_of(grad));
  a.grad = grad.const_data_ptr();
  run_input(a, grad, weights, element, (feature_major ? out : *result).mutable_data_ptr(), stream);
  if (!feature_major) {
    gpu::transpose_cuda({result->const_data_ptr(), out.mutable_data_ptr(), in_features, a.gemm.m},
                        element == Element::kFloat ? 4 : 2, stream);
  }
  return out;
}

Tensor tile_grad_weight(const Tensor& grad_in, const Tensor& x_in, const Tensor& index,
                        const Tensor& tile_ptr, const Tensor& columns, int64_t granularity,
                        int64_t nnz, int64_t feature_dim) {
  const bool feature_major = check_layout(grad_in, "grad", feature_dim);
  const Element element = check_element(grad_in);
  STD_TORCH_CHECK(x_in.dim() == grad_in.dim(), "x must have the dimensions of grad ",
                  shape_of(grad_in), ", got ", shape_of(x_in));
  const int64_t axis = feature_major ? 1 : x_in.dim() - 1;
  for (int64_t i = 0; i < x_in.dim(); ++i) {
    STD_TORCH_CHECK(i == axis || x_in.size(i) == grad_in.size(i), "x must have shape ",
                    shape_of(grad_in), " but for its features, got ", shape_of(x_in));
  }
  const Structure structure(index, tile_ptr, columns, granularity, grad_in);
  structure.check_count(nnz);
  TileGradientArgs a = gradient_args(structure, x_in.size(axis));
  Tensor grad = like_input(grad_in, "grad", grad_in), x = like_input(x_in, "x", grad_in);
  Tensor out = empty_like(grad, {nnz}, type_of(grad));
  const OnDeviceOf guard(grad);
  if (grad.numel() == 0 || x.numel() == 0) {
    torch::stable::zero_(out);
    return out;
  }
  void* const stream = current_stream(grad);
  grad = feature_major_of(grad, feature_major, structure, element, stream, &a.gemm);
  if (!feature_major) x = transposed(x, a.gemm.m, a.gemm.k, element, stream);
  a.grad = grad.const_data_ptr();
  a.gemm.x = x.const_data_ptr();
  run_weight(a, grad, element, out, stream);
  return out;
}

// The geometry of a convolution of an input (B, C, H, W) that gave grad (B, N, OH, OW).
TileGradientArgs window_args(const Tensor& grad, const Structure& structure, int64_t channels,
                             const IntList& size, const IntList& kernel_size, const IntList& stride,
                             const IntList& padding, const IntList& dilation, int64_t groups) {
  check_windows(kernel_size, stride, padding, dilation);
  check_pair(size, "size", 0);
  check_cuda_tensor(grad, "grad");
  STD_TORCH_CHECK(grad.dim() == 4, "grad must have shape (B, N, OH, OW), got ", shape_of(grad));
  STD_TORCH_CHECK(
      channels >= 0 && groups >= 1 && channels % groups == 0 && grad.size(1) % groups == 0,
      "groups must divide ", channels, " input and ", grad.size(1), " output channels, got ",
      groups);
  TileConv c{};
  c.batch = grad.size(0), c.channels = channels, c.height = size[0], c.width = size[1];
  set_windows(kernel_size, stride, padding, dilation, &c);
  check_window(&c);
  check_shape(grad, "grad", {c.batch, grad.size(1), c.out_h, c.out_w});
  const int64_t window = c.kernel_h * c.kernel_w;
  STD_TORCH_CHECK(window <= 1 << 24, "kernel_size must be at most 2**24 elements, got ", window);
  TileGradientArgs a = gradient_args(structure, channels / groups * window);
  set_features(grad, structure, &a.gemm);
  gpu::TileWindow& w = a.gemm.window;
  w.channels = channels, w.groups = groups;
  w.height = small_size(c.height, "height"), w.width = small_size(c.width, "width");
  w.out_w = small_size(c.out_w, "width");
  small_size(a.gemm.m, "the output plane");
  small_size(c.height * c.width, "the input plane");
  copy_windows(c, &w);
  return a;
}

Tensor tile_conv_grad_input(const Tensor& grad_in, const Tensor& values, const Tensor& index,
                            const Tensor& tile_ptr, const Tensor& columns, int64_t granularity,
                            int64_t in_channels, const IntList& size, const IntList& kernel_size,
                            const IntList& stride, const IntList& padding, const IntList& dilation,
                            int64_t groups) {
  check_cuda_tensor(grad_in, "grad");
  const Element element = check_element(grad_in);
  const Structure structure(index, tile_ptr, columns, granularity, grad_in);
  TileGradientArgs a = window_args(grad_in, structure, in_channels, size, kernel_size, stride,
                                   padding, dilation, groups);
  PackedValues weights(values, structure, grad_in);
  const Tensor grad = like_input(grad_in, "grad", grad_in);
  Tensor out = empty_like(grad, {a.gemm.batch, in_channels, size[0], size[1]}, type_of(grad));
  if (out.numel() == 0) return out;
  const OnDeviceOf guard(grad);
  a.grad = grad.const_data_ptr();
  run_input(a, grad, weights, element, out.mutable_data_ptr(), current_stream(grad));
  return out;
}

Tensor tile_conv_grad_weight(const Tensor& grad_in, const Tensor& x_in, const Tensor& index,
                             const Tensor& tile_ptr, const Tensor& columns, int64_t granularity,
                             int64_t nnz, const IntList& kernel_size, const IntList& stride,
                             const IntList& padding, const IntList& dilation, int64_t groups) {
  check_cuda_tensor(grad_in, "grad");
  const Element element = check_element(grad_in);
  STD_TORCH_CHECK(x_in.dim() == 4 && grad_in.dim() == 4 && x_in.size(0) == grad_in.size(0),
                  "x must have shape (B, C, H, W) and grad (B, N, OH, OW), got ", shape_of(x_in),
                  " and ", shape_of(grad_in));
  const Structure structure(index, tile_ptr, columns, granularity, grad_in);
  structure.check_count(nnz);
  TileGradientArgs a = window_args(grad_in, structure, x_in.size(1), {x_in.size(2), x_in.size(3)},
                                   kernel_size, stride, padding, dilation, groups);
  const Tensor grad = like_input(grad_in, "grad", grad_in), x = like_input(x_in, "x", grad_in);
  Tensor out = empty_like(grad, {nnz}, type_of(grad));
  const OnDeviceOf guard(grad);
  if (grad.numel() == 0 || x.numel() == 0) {
    torch::stable::zero_(out);
    return out;
  }
  a.grad = grad.const_data_ptr();
  a.gemm.x = x.const_data_ptr();
  run_weight(a, grad, element, out, current_stream(grad));
  return out;
}

}  // namespace
}  // namespace fxprune::cuda_ops

FXPRUNE_GPU_OPERATORS(m) {
  m.impl("tile_grad_input", TORCH_BOX(&fxprune::cuda_ops::tile_grad_input));
  m.impl("tile_grad_weight", TORCH_BOX(&fxprune::cuda_ops::tile_grad_weight));
  m.impl("tile_conv_grad_input", TORCH_BOX(&fxprune::cuda_ops::tile_conv_grad_input));
  m.impl("tile_conv_grad_weight", TORCH_BOX(&fxprune::cuda_ops::tile_conv_grad_weight));
}
