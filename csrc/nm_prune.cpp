// fxprune::nm_prune: checks, the memory formats, and how the work is cut.
#include <algorithm>
#include <array>
#include <vector>

#include "channels_last.h"
#include "check.h"
#include "fxprune/kernels.h"
#include "fxprune/nm_prune.h"
#include "parallel.h"

namespace fxprune {
namespace {

constexpr std::array<const char*, 5> kFunctions = {"random", "magnitude", "rescaled_magnitude",
                                                   "group_rescaled_magnitude", "mvue"};

NmFunction check_function(const Text& name) {
  std::string legal;
  for (size_t i = 0; i < kFunctions.size(); ++i) {
    if (name.value == kFunctions[i]) return static_cast<NmFunction>(i);
    legal += (i ? ", " : "") + std::string(kFunctions[i]);
  }
  STD_TORCH_CHECK(false, "unknown function '", name.value, "'; legal: ", legal);
}

Element check_element(const Tensor& t) {
  static const std::array<int32_t, 3> types = {
      aoti_torch_dtype_float32(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  int32_t given;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &given));
  const auto found = std::find(types.begin(), types.end(), given);
  STD_TORCH_CHECK(found != types.end(), "grad must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(t.is_cpu(), "grad must be on the CPU");
  return static_cast<Element>(found - types.begin());
}

// Mixes the counters in `key` and the layer into the two words every random number starts from.
void check_key(const OptionalTensor& key_in, int64_t layer, NmPrune* a) {
  const bool random = a->function == NmFunction::kRandom || a->function == NmFunction::kMvue;
  STD_TORCH_CHECK(key_in.has_value() || !random, "key must be given for function '",
                  kFunctions[static_cast<size_t>(a->function)], "'");
  uint64_t state = 0;
  const auto add = [&state](uint64_t value) {  // a step of SplitMix64 (Steele, Lea, Flood 2014)
    state = (state ^ value) + 0x9e3779b97f4a7c15u;
    state = (state ^ (state >> 30)) * 0xbf58476d1ce4e5b9u;
    state = (state ^ (state >> 27)) * 0x94d049bb133111ebu;
    state ^= state >> 31;
  };
  if (key_in.has_value()) {
    check_tensor(*key_in, "key", element_types().int64, "int64");
    STD_TORCH_CHECK(key_in->dim() == 1, "key must have one dimension, got shape ",
                    shape_of(*key_in));
    const Tensor key = key_in->is_contiguous() ? *key_in : torch::stable::contiguous(*key_in);
    for (int64_t i = 0; i < key.size(0); ++i) add(static_cast<uint64_t>(data<int64_t>(key)[i]));
  }
  add(static_cast<uint64_t>(layer));
  a->key[0] = static_cast<uint32_t>(state);
  a->key[1] = static_cast<uint32_t>(state >> 32);
}

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
  length = (length + k.width - 1) / k.width * k.width;
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
  a.element = check_element(grad_in);
  a.function = check_function(function);
  STD_TORCH_CHECK(m >= 1 && m <= kMostOfGroup, "m must lie in [1, ", kMostOfGroup, "], got ", m);
  STD_TORCH_CHECK(n >= 1 && n <= m, "n must lie in [1, m = ", m, "], got ", n);
  STD_TORCH_CHECK(dim == 1 || dim == -1, "dim must be 1 or -1, got ", dim);
  const int64_t rank = grad_in.dim();
  STD_TORCH_CHECK(rank >= (dim == 1 ? 2 : 1), "grad must have ",
                  dim == 1 ? "two dimensions" : "one", " or more, got shape ", shape_of(grad_in));
  const int64_t axis = dim == 1 ? 1 : rank - 1;
  a.n = n, a.m = m, a.conv_groups = groups, a.channels = grad_in.size(axis);
  STD_TORCH_CHECK(groups >= 1 && a.channels % groups == 0, "groups must divide the ", a.channels,
                  " channels, got ", groups);
  check_key(key, layer, &a);
  const bool last = dim == 1 && !grad_in.is_contiguous() && is_channels_last(grad_in);
  const Tensor grad =
      last || grad_in.is_contiguous() ? grad_in : torch::stable::contiguous(grad_in);
  Tensor out = empty_same(grad);
  if (grad.numel() == 0) return out;
  a.row_major = last || dim == -1;
  a.samples = dim == -1 && rank < 3 ? 1 : grad.size(0);
  a.positions = grad.numel() / (a.samples * a.channels);
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
