// fxprune::nm_prune on the CPU: how the work is cut.
#include <algorithm>

#include "fxprune/kernels.h"
#include "nm_arguments.h"
#include "parallel.h"

namespace fxprune {
namespace {

// Calls the kernel on units of a few groups of channels; where that gives too few, positions are
// cut as well, unless a factor depends on all of them.
void run(const NmPrune& a, int64_t pool) {
  const Kernels& k = kernels();
  constexpr int64_t kChannels = 2048;  // of a unit, whose transposed rows then stay in L2
  const int64_t groups = a.groups();
  int64_t step = a.row_major ? std::max<int64_t>(1, kChannels / a.m) : 1;
  int64_t parts = (groups + step - 1) / step;
  const int64_t units = a.samples * parts;
  int64_t cuts = 1;
  if (a.function != NmFunction::kRescaled && units < 8 * pool) {
    const int64_t vecs = (a.positions + k.width - 1) / k.width;
    cuts = std::clamp<int64_t>(8 * pool / std::max<int64_t>(units, 1), 1, (vecs + 15) / 16);
  }
  int64_t length = (a.positions + cuts - 1) / cuts;
  const int64_t lanes = 2 * k.width;  // of a vector of the narrowest elements
  length = (length + lanes - 1) / lanes * lanes;
  cuts = (a.positions + length - 1) / length;
  for_each_unit(a.samples * parts * cuts, pool, [&](int64_t unit) {
    const int64_t part = unit / cuts % parts, cut = unit % cuts;
    const NmSpan span = {unit / cuts / parts, part * step, std::min(part * step + step, groups),
                         cut * length, std::min((cut + 1) * length, a.positions)};
    const int64_t channels = a.first_channel(span.last_group) - a.first_channel(span.first_group);
    k.nm_prune(a, span, a.row_major ? scratch(nm_scratch(channels + k.width, k.width)) : nullptr);
  });
}

Tensor nm_prune_cpu(const Tensor& grad_in, const OptionalTensor& key, int64_t n, int64_t m,
                    int64_t dim, int64_t groups, const Text& function, int64_t layer) {
  NmPrune a{};
  a.element = check_nm_element(grad_in);
  STD_TORCH_CHECK(grad_in.is_cpu(), "grad must be on the CPU");
  a.function = check_nm_function(function);
  const Tensor grad = check_nm_geometry(grad_in, n, m, dim, groups, &a);
  check_nm_key(key, a.function);
  const uint64_t state = add_counter(mix_counters(key), static_cast<uint64_t>(layer));
  a.key[0] = static_cast<uint32_t>(state);
  a.key[1] = static_cast<uint32_t>(state >> 32);
  Tensor out = empty_same(grad);
  if (grad.numel() == 0) return out;
  a.x = grad.const_data_ptr();
  a.out = out.mutable_data_ptr();
  run(a, torch::stable::get_num_threads());
  return out;
}

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY_FRAGMENT(fxprune, m) {
  m.def(
      "nm_prune(Tensor grad, Tensor? key, int n, int m, int dim, int groups, str function, "
      "int layer) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) {
  m.impl("nm_prune", TORCH_BOX(&fxprune::nm_prune_cpu));
}
