// fxprune::clear_pruned on the CPU: zeros at the pruned elements of weights and moments.
//
//   values: (N, ...) of 2, 4 or 8 bytes an element, contiguous, changed in place
//   kept:   int8 or int32 (N / g, ...), all bits set or none; each row is that of g rows of values
//
// An AND of integers, exact over NaN and Inf.
#include <algorithm>
#include <vector>

#include "check.h"
#include "parallel.h"

namespace fxprune {
namespace {

ClearRows check(const Tensor& values, const Tensor& kept) {
  ClearRows a{};
  a.element = float_bytes(values);
  STD_TORCH_CHECK(a.element > 0, "values must be float16, bfloat16, float32 or float64");
  a.bits = type_of(kept) == element_types().int32 ? 4 : 1;
  STD_TORCH_CHECK(a.bits == 4 || type_of(kept) == aoti_torch_dtype_int8(),
                  "kept must be int8 or int32");
  STD_TORCH_CHECK(values.is_cpu() && kept.is_cpu(), "values and kept must be on the CPU");
  STD_TORCH_CHECK(values.is_contiguous() && kept.is_contiguous(),
                  "values and kept must be contiguous");
  STD_TORCH_CHECK(values.dim() > 0 && kept.dim() > 0, "values and kept must have dimensions");
  a.rows = values.size(0);
  if (values.numel() == 0) return a;
  a.width = values.numel() / a.rows;
  const int64_t rows = kept.size(0);
  STD_TORCH_CHECK(rows > 0 && a.rows % rows == 0 && kept.numel() == rows * a.width,
                  "kept must have shape (N / g, ...) beside values of shape ", shape_of(values),
                  ", got ", shape_of(kept));
  a.shared = a.rows / rows;
  a.values = values.mutable_data_ptr();
  a.kept = kept.const_data_ptr();
  return a;
}

void clear_pruned_cpu(std::vector<Tensor> values, std::vector<Tensor> kept) {
  STD_TORCH_CHECK(values.size() == kept.size(), "values and kept must be as many, got ",
                  values.size(), " and ", kept.size());
  constexpr int64_t kBytes = 1 << 16;  // of a unit
  std::vector<ClearRows> all;
  std::vector<int64_t> units;  // of each tensor
  for (size_t i = 0; i < values.size(); ++i) {
    const ClearRows a = check(values[i], kept[i]);
    if (a.values == nullptr) continue;
    const int64_t step = std::max<int64_t>(1, kBytes / (a.width * a.element));
    units.push_back((a.rows + step - 1) / step);
    all.push_back(a);
  }
  for_each_unit_of(units, torch::stable::get_num_threads(), [&](size_t i, int64_t unit) {
    const ClearRows& a = all[i];
    const int64_t step = std::max<int64_t>(1, kBytes / (a.width * a.element));
    const int64_t first = unit * step;
    kernels().clear_rows(a, first, std::min(first + step, a.rows));
  });
}

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY_FRAGMENT(fxprune, m) {
  m.def("clear_pruned(Tensor(a!)[] values, Tensor[] kept) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) {
  m.impl("clear_pruned", TORCH_BOX(&fxprune::clear_pruned_cpu));
}
