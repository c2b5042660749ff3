// fxprune::skip_zeros_mm: checks, the memory formats, and how the work is cut.
#include <algorithm>
#include <vector>

#include "channels_last.h"
#include "check.h"
#include "fxprune/kernels.h"
#include "fxprune/skip_zeros.h"
#include "parallel.h"

namespace fxprune {
namespace {

// Calls the kernel on units of up to kSkipRows rows, at least one per thread where there are rows.
void run(const SkipZeros& a, int64_t pool) {
  const Kernels& k = kernels();
  const int64_t rows = a.rows();
  const int64_t wanted = std::max(pool, (rows + kSkipRows - 1) / kSkipRows);
  const int64_t units = (wanted + pool - 1) / pool * pool;
  int64_t length = (rows + units - 1) / units;
  length = (length + k.width - 1) / k.width * k.width;
  for_each_unit((rows + length - 1) / length, pool, [&](int64_t unit) {
    const int64_t first = unit * length, last = std::min(first + length, rows);
    k.skip_zeros(a, first, last, scratch(skip_scratch(a, last - first, k.width)));
  });
}

Tensor skip_zeros_mm_cpu(const Tensor& x_in, const Tensor& weight_in, int64_t dim) {
  SkipZeros a{};
  STD_TORCH_CHECK(dim == 1 || dim == -1, "dim must be 1 or -1, got ", dim);
  check_tensor(x_in, "x", element_types().float32, "float32");
  const int64_t rank = x_in.dim();
  STD_TORCH_CHECK(rank >= (dim == 1 ? 2 : 1), "x must have ", dim == 1 ? "two dimensions" : "one",
                  " or more, got shape ", shape_of(x_in));
  STD_TORCH_CHECK(weight_in.dim() == 2, "weight must have shape (N, K), got ", shape_of(weight_in));
  const int64_t axis = dim == 1 ? 1 : rank - 1;
  a.n = x_in.size(axis);
  a.k = weight_in.size(1);
  check_shape(weight_in, "weight", {a.n, a.k});
  const Tensor weight = float_input(weight_in, "weight");
  const bool last = dim == 1 && !x_in.is_contiguous() && is_channels_last(x_in);
  const Tensor x = last ? x_in : float_input(x_in, "x");
  std::vector<int64_t> shape(rank);
  for (int64_t i = 0; i < rank; ++i) shape[i] = i == axis ? a.k : x.size(i);
  Tensor out = last ? empty_channels_last(x, shape) : empty_output(x, shape);
  if (out.numel() == 0) return out;
  if (a.n == 0) {
    torch::stable::zero_(out);
    return out;
  }
  a.row_major = last || dim == -1 || rank == 2;
  a.samples = a.row_major ? 1 : x.size(0);
  a.positions = x.numel() / (a.samples * a.n);
  a.x = data<float>(x);
  a.w = data<float>(weight);
  a.out = static_cast<float*>(out.mutable_data_ptr());
  run(a, torch::stable::get_num_threads());
  return out;
}

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY_FRAGMENT(fxprune, m) {
  m.def("skip_zeros_mm(Tensor x, Tensor weight, int dim) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) {
  m.impl("skip_zeros_mm", TORCH_BOX(&fxprune::skip_zeros_mm_cpu));
}
