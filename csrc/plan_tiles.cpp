// What a plan of tiles counts and compares, on the CPU:
//
//   fxprune::tile_scores  the root mean square of each K row over the features of a tile
//   fxprune::keep_best    which units of many tiles stay when all of them are ranked together
//   fxprune::held_scores  element scores that put what is pruned below everything else
//   fxprune::shared_rows  how many rows of a mask are the same
//   fxprune::tile_counts  how many features of a tile keep each K row
//   fxprune::zero_outside whether values are zero where a mask does not keep them
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "channels_last.h"
#include "check.h"
#include "parallel.h"

namespace fxprune {
namespace {

constexpr float kInfinite = std::numeric_limits<float>::infinity();

void check_flat(const Tensor& t, const char* name, int32_t type, const char* type_name,
                int64_t dimensions) {
  check_tensor(t, name, type, type_name);
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(t.dim() == dimensions, name, " must have ", dimensions, " dimensions, got shape ",
                  shape_of(t));
}

TileCut check_cut(const Tensor& matrix, const Tensor& columns, int64_t granularity) {
  check_flat(columns, "columns", element_types().int64, "int64", 1);
  STD_TORCH_CHECK(granularity >= 1, "granularity must be at least 1, got ", granularity);
  const int64_t features = matrix.size(0), kept = columns.numel();
  const int64_t* column = data<int64_t>(columns);
  for (int64_t i = 0; i < kept; ++i) {
    STD_TORCH_CHECK(column[i] >= 0 && column[i] < features, "columns must lie in [0, ", features,
                    "), got ", column[i]);
  }
  return {column, kept, std::min(granularity, std::max<int64_t>(kept, 1)), matrix.size(1)};
}

// ---- tile_scores ----

Tensor tile_scores_cpu(const Tensor& importance, const Tensor& columns, int64_t granularity) {
  check_flat(importance, "importance", element_types().float32, "float32", 2);
  TileScores a{check_cut(importance, columns, granularity)};
  const int64_t tiles = a.tiles();
  Tensor scores = empty_output(importance, {tiles, a.k});
  if (tiles * a.k == 0) return scores;
  a.values = data<float>(importance);
  a.scores = static_cast<float*>(scores.mutable_data_ptr());
  for_each_unit(tiles, torch::stable::get_num_threads(),
                [&](int64_t tile) { kernels().tile_scores(a, tile, tile + 1); });
  return scores;
}

// ---- keep_best ----

struct Ranked {
  const float* scores;
  const int64_t* weights;  // of one unit of each tile
  int64_t tiles, units;
};

// A number that is smaller, the better a unit is: of the larger score, then of the lower index.
uint64_t rank_of(float score, int64_t index) {
  const float positive_zero = score + 0.0f;
  uint32_t bits;
  std::memcpy(&bits, &positive_zero, sizeof bits);
  const uint32_t rising = bits >> 31 ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(~rising) << 32 | static_cast<uint64_t>(index);
}

// Returns the rank of the worst unit that stays: all up to it weigh `budget`, to the nearest unit.
// 0, which no finite score has, when none stays. Ranks are reordered.
uint64_t last_within(std::vector<uint64_t>* ranks, const std::vector<int64_t>& weights,
                     double budget) {
  const auto weight_of = [&](uint64_t rank) {
    return static_cast<double>(weights[static_cast<uint32_t>(rank)]);
  };
  constexpr int64_t kFew = 32;
  double total = 0;  // of those that are known to stay
  uint64_t last = 0;
  auto low = ranks->begin(), high = ranks->end();
  while (high - low > kFew) {
    const auto middle = low + (high - low) / 2;
    std::nth_element(low, middle, high);
    double sum = weight_of(*middle);
    for (auto i = low; i < middle; ++i) sum += weight_of(*i);
    if (total + sum - weight_of(*middle) / 2 <= budget) {
      total += sum, last = *middle, low = middle + 1;
    } else {
      high = middle;
    }
  }
  std::sort(low, high);
  for (; low < high; ++low) {
    total += weight_of(*low);
    if (!(total - weight_of(*low) / 2 <= budget)) break;
    last = *low;
  }
  return last;
}

Ranked check_ranked(const Tensor& scores, const Tensor& weights) {
  check_flat(scores, "scores", element_types().float32, "float32", 2);
  check_flat(weights, "weights", element_types().int64, "int64", 1);
  check_shape(weights, "weights", {scores.size(0)});
  const Ranked r{data<float>(scores), data<int64_t>(weights), scores.size(0), scores.size(1)};
  for (int64_t t = 0; t < r.tiles; ++t) {
    STD_TORCH_CHECK(r.weights[t] >= 1 && r.weights[t] <= int64_t{1} << 40,
                    "weights must lie in [1, 2^40], got ", r.weights[t]);
  }
  return r;
}

std::vector<Tensor> keep_best_cpu(std::vector<Tensor> scores, std::vector<Tensor> weights,
                                  double budget, bool guarded) {
  STD_TORCH_CHECK(scores.size() == weights.size(), "scores and weights must be as many, got ",
                  scores.size(), " and ", weights.size());
  std::vector<Ranked> layers;
  int64_t total = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    layers.push_back(check_ranked(scores[i], weights[i]));
    total += scores[i].numel();
  }
  STD_TORCH_CHECK(total <= int64_t{1} << 31, "scores must be at most 2^31, got ", total);
  std::vector<uint64_t> ranks;
  std::vector<int64_t> weight;
  ranks.reserve(total), weight.reserve(total);
  for (const Ranked& layer : layers) {
    for (int64_t t = 0; t < layer.tiles && layer.units > 0; ++t) {
      const float* row = layer.scores + t * layer.units;
      const int64_t start = ranks.size();
      for (int64_t u = 0; u < layer.units; ++u) ranks.push_back(rank_of(row[u], start + u));
      if (guarded) {
        const int64_t best = std::max_element(row, row + layer.units) - row;
        ranks[start + best] = rank_of(kInfinite, start + best);
      }
      weight.insert(weight.end(), layer.units, layer.weights[t]);
    }
  }
  std::vector<uint64_t> ordered = ranks;
  const uint64_t last = last_within(&ordered, weight, budget);
  const uint64_t least = rank_of(-kInfinite, 0), most = rank_of(kInfinite, 0) | 0xffffffffu;
  std::vector<Tensor> kept;
  const uint64_t* rank = ranks.data();
  for (size_t i = 0; i < scores.size(); ++i) {
    kept.push_back(
        empty_output(scores[i], {layers[i].tiles, layers[i].units}, aoti_torch_dtype_bool()));
    if (scores[i].numel() == 0) continue;
    bool* out = static_cast<bool*>(kept.back().mutable_data_ptr());
    for (int64_t u = 0; u < scores[i].numel(); ++u, ++rank)
      out[u] = (*rank <= last || *rank <= most) && *rank < least;
  }
  return kept;
}

// ---- held_scores ----

Tensor held_scores_cpu(const Tensor& scores, const Tensor& kept, double share, bool magnitudes) {
  check_tensor(scores, "scores", element_types().float32, "float32");
  check_tensor(kept, "kept", aoti_torch_dtype_bool(), "bool");
  STD_TORCH_CHECK(scores.is_contiguous() && kept.is_contiguous(),
                  "scores and kept must be contiguous");
  STD_TORCH_CHECK(shape_of(scores) == shape_of(kept), "kept must have the shape of scores, ",
                  shape_of(scores), ", got ", shape_of(kept));
  Tensor out = empty_same(scores);
  if (scores.numel() == 0) return out;
  kernels().held_scores({data<float>(scores), data<bool>(kept),
                         static_cast<float*>(out.mutable_data_ptr()), scores.numel(),
                         static_cast<float>(share), magnitudes});
  return out;
}

// ---- shared_rows ----

bool shares(const char* mask, int64_t rows, int64_t width, int64_t group) {
  for (int64_t row = 0; row < rows; ++row) {
    if (row % group != 0 && std::memcmp(mask + row * width, mask + (row - 1) * width, width) != 0)
      return false;
  }
  return true;
}

int64_t shared_rows_cpu(const Tensor& mask, std::vector<int64_t> groups) {
  check_tensor(mask, "mask", aoti_torch_dtype_bool(), "bool");
  STD_TORCH_CHECK(mask.is_contiguous() && mask.dim() > 0, "mask must be contiguous, (N, ...)");
  const int64_t rows = mask.size(0);
  for (int64_t group : groups) STD_TORCH_CHECK(group >= 1, "groups must be positive, got ", group);
  if (mask.numel() == 0) return 1;
  for (int64_t group : groups) {
    const int64_t width = mask.numel() / rows;
    if (rows % group == 0 && shares(data<char>(mask), rows, width, group)) return group;
  }
  return 1;
}

// ---- tile_counts ----

Tensor tile_counts_cpu(const Tensor& mask, const Tensor& columns, int64_t granularity) {
  check_flat(mask, "mask", aoti_torch_dtype_bool(), "bool", 2);
  TileCounts a{check_cut(mask, columns, granularity)};
  const int64_t tiles = a.tiles();
  Tensor counts = empty_output(mask, {tiles, a.k}, element_types().int32);
  if (tiles * a.k == 0) return counts;
  a.mask = data<uint8_t>(mask);
  a.counts = static_cast<int32_t*>(counts.mutable_data_ptr());
  for_each_unit(tiles, torch::stable::get_num_threads(),
                [&](int64_t tile) { kernels().tile_counts(a, tile, tile + 1); });
  return counts;
}

// ---- zero_outside ----

bool zero_outside_cpu(const Tensor& values, const Tensor& mask) {
  ZeroOutside a{};
  a.bytes = float_bytes(values);
  STD_TORCH_CHECK(a.bytes > 0 && values.is_cpu(),
                  "values must be float16, bfloat16, float32 or float64, on the CPU");
  check_tensor(mask, "mask", aoti_torch_dtype_bool(), "bool");
  STD_TORCH_CHECK(values.is_contiguous() && mask.is_contiguous(),
                  "values and mask must be contiguous");
  STD_TORCH_CHECK(shape_of(values) == shape_of(mask), "mask must have the shape of values, ",
                  shape_of(values), ", got ", shape_of(mask));
  a.count = values.numel();
  if (a.count == 0) return true;
  a.values = values.const_data_ptr();
  a.mask = data<uint8_t>(mask);
  constexpr int64_t kUnit = 1 << 18;
  std::atomic<bool> zero{true};
  for_each_unit((a.count + kUnit - 1) / kUnit, torch::stable::get_num_threads(), [&](int64_t unit) {
    if (!zero.load(std::memory_order_relaxed)) return;
    const int64_t end = std::min((unit + 1) * kUnit, a.count);
    if (!kernels().zero_outside(a, unit * kUnit, end)) zero.store(false, std::memory_order_relaxed);
  });
  return zero.load();
}

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY_FRAGMENT(fxprune, m) {
  m.def("tile_scores(Tensor importance, Tensor columns, int granularity) -> Tensor");
  m.def("keep_best(Tensor[] scores, Tensor[] weights, float budget, bool guarded) -> Tensor[]");
  m.def("held_scores(Tensor scores, Tensor kept, float share, bool magnitudes) -> Tensor");
  m.def("shared_rows(Tensor mask, int[] groups) -> int");
  m.def("tile_counts(Tensor mask, Tensor columns, int granularity) -> Tensor");
  m.def("zero_outside(Tensor values, Tensor mask) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) {
  m.impl("tile_scores", TORCH_BOX(&fxprune::tile_scores_cpu));
  m.impl("keep_best", TORCH_BOX(&fxprune::keep_best_cpu));
  m.impl("held_scores", TORCH_BOX(&fxprune::held_scores_cpu));
  m.impl("shared_rows", TORCH_BOX(&fxprune::shared_rows_cpu));
  m.impl("tile_counts", TORCH_BOX(&fxprune::tile_counts_cpu));
  m.impl("zero_outside", TORCH_BOX(&fxprune::zero_outside_cpu));
}
