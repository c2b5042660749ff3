// fxprune::add_squares on the CPU: Taylor scores of many weights, in one pass over each.
//
//   sums[i] += (a[i] * b[i])^2      float32, contiguous, of one shape for each i; sums is changed
#include <algorithm>
#include <vector>

#include "check.h"
#include "parallel.h"

namespace fxprune {
namespace {

AddSquares check(const Tensor& sums, const Tensor& a, const Tensor& b) {
  for (const Tensor& t : {sums, a, b}) {
    STD_TORCH_CHECK(type_of(t) == element_types().float32 && t.is_cpu() && t.is_contiguous(),
                    "sums, a and b must be contiguous float32 on the CPU");
    STD_TORCH_CHECK(shape_of(t) == shape_of(sums), "a and b must have the shape of sums, ",
                    shape_of(sums), ", got ", shape_of(t));
  }
  if (sums.numel() == 0) return {};
  return {static_cast<float*>(sums.mutable_data_ptr()),
          static_cast<const float*>(a.const_data_ptr()),
          static_cast<const float*>(b.const_data_ptr()), sums.numel()};
}

void add_squares_cpu(std::vector<Tensor> sums, std::vector<Tensor> a, std::vector<Tensor> b) {
  STD_TORCH_CHECK(sums.size() == a.size() && sums.size() == b.size(),
                  "sums, a and b must be as many, got ", sums.size(), ", ", a.size(), " and ",
                  b.size());
  constexpr int64_t kUnit = 1 << 14;  // elements
  std::vector<AddSquares> all;
  std::vector<int64_t> units;  // of each tensor
  for (size_t i = 0; i < sums.size(); ++i) {
    all.push_back(check(sums[i], a[i], b[i]));
    units.push_back((all.back().count + kUnit - 1) / kUnit);
  }
  for_each_unit_of(units, torch::stable::get_num_threads(), [&](size_t i, int64_t unit) {
    const int64_t first = unit * kUnit;
    kernels().add_squares(all[i], first, std::min(first + kUnit, all[i].count));
  });
}

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY_FRAGMENT(fxprune, m) {
  m.def("add_squares(Tensor(a!)[] sums, Tensor[] a, Tensor[] b) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) {
  m.impl("add_squares", TORCH_BOX(&fxprune::add_squares_cpu));
}
