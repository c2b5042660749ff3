// fxprune::skip_zeros_mm and skip_zeros_conv: checks, the memory formats, and how the work is cut.
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

// Calls the kernel on bands of about kSkipRows pixels: whole samples where they are small, at least
// one band per thread where there are rows.
void run(const SkipConv& a, int64_t pool) {
  const Kernels& k = kernels();
  const int64_t samples = a.x.samples, rows_wanted = std::max<int64_t>(1, kSkipRows / a.w_out);
  int64_t together = std::clamp<int64_t>(kSkipRows / a.out.positions, 1, samples);
  together = std::min(together, (samples + pool - 1) / pool);
  const int64_t wanted = together > 1 ? a.h : std::min(rows_wanted, a.h);
  int64_t bands = (a.h + wanted - 1) / wanted;
  if (samples * bands < pool) bands = std::min(a.h, (pool + samples - 1) / samples);
  const int64_t height = (a.h + bands - 1) / bands, groups = (samples + together - 1) / together;
  bands = (a.h + height - 1) / height;
  for_each_unit(groups * bands, pool, [&](int64_t unit) {
    const int64_t sample = unit / bands * together, row = unit % bands * height;
    const SkipBand band = {sample, std::min(sample + together, samples), row,
                           std::min(row + height, a.h)};
    k.skip_zeros_conv(a, band, scratch(skip_conv_scratch(a, band, k.width)));
  });
}

Tensor skip_zeros_conv_cpu(const Tensor& x_in, const Tensor& weight_in,
                           const std::vector<int64_t>& padding) {
  SkipConv a{};
  check_tensor(x_in, "x", element_types().float32, "float32");
  check_tensor(weight_in, "weight", element_types().float32, "float32");
  STD_TORCH_CHECK(x_in.dim() == 4, "x must have shape (B, N, H, W), got ", shape_of(x_in));
  STD_TORCH_CHECK(weight_in.dim() == 4 && weight_in.size(0) == x_in.size(1),
                  "weight must have shape (", x_in.size(1), ", K, R, S), got ",
                  shape_of(weight_in));
  a.r = weight_in.size(2), a.s = weight_in.size(3);
  STD_TORCH_CHECK(padding.size() == 2 && 0 <= padding[0] && padding[0] < a.r && 0 <= padding[1] &&
                      padding[1] < a.s,
                  "padding must be two numbers from 0 on and smaller than the window ", a.r, "x",
                  a.s);
  a.pad_h = padding[0], a.pad_w = padding[1];
  a.in_h = x_in.size(2), a.in_w = x_in.size(3);
  a.h = a.in_h + a.r - 1 - 2 * a.pad_h, a.w_out = a.in_w + a.s - 1 - 2 * a.pad_w;
  STD_TORCH_CHECK(a.h >= 0 && a.w_out >= 0, "x of ", a.in_h, "x", a.in_w,
                  " is smaller than the padding takes away");
  const bool last = !x_in.is_contiguous() && is_channels_last(x_in);
  const Tensor x = last ? x_in : float_input(x_in, "x");
  Tensor weight = weight_in;
  if (!is_channels_last(weight)) {
    weight = empty_channels_last(x, {x.size(1), weight_in.size(1), a.r, a.s});
    torch::stable::copy_(weight, weight_in);
  }
  const std::vector<int64_t> shape = {x.size(0), weight.size(1), a.h, a.w_out};
  Tensor out = last ? empty_channels_last(x, shape) : empty_output(x, shape);
  if (out.numel() == 0) return out;
  if (x.numel() == 0) {
    torch::stable::zero_(out);
    return out;
  }
  a.x = {data<float>(x), nullptr, nullptr, x.size(0), a.in_h * a.in_w, x.size(1), shape[1], last};
  float* to = static_cast<float*>(out.mutable_data_ptr());
  a.out = {nullptr, nullptr, to, x.size(0), a.h * a.w_out, 0, shape[1], last};
  a.w = data<float>(weight);
  run(a, torch::stable::get_num_threads());
  return out;
}

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY_FRAGMENT(fxprune, m) {
  m.def("skip_zeros_mm(Tensor x, Tensor weight, int dim) -> Tensor");
  m.def("skip_zeros_conv(Tensor x, Tensor weight, int[] padding) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) {
  m.impl("skip_zeros_mm", TORCH_BOX(&fxprune::skip_zeros_mm_cpu));
  m.impl("skip_zeros_conv", TORCH_BOX(&fxprune::skip_zeros_conv_cpu));
}
