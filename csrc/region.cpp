// fxprune::region: a chain of operators as one call, from a program of step records.
//
// Intermediate values live in an arena with planned offsets and never become tensors. With at least
// one image per thread, every thread takes whole images through the whole program, so that nothing
// waits and an image's values stay in its core's cache; otherwise images run one after the other
// and each step is cut over the threads.
//
//   record: code, count, then `count` arguments
//   depthwise (0): x, weight, taps, bias, kernel h w, stride h w, padding h w, dilation h w,
//   activation gemm (1):      x, values, index, tile_ptr, columns, bias, residual, gate,
//   out_features, granularity, feature_dim,
//                  activation
//   mean (2):      x
//
// x, residual and gate are values: first the inputs, then one per step. Weights are indices into
// `packed`. -1 is absent.
#include <algorithm>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "check.h"
#include "parallel.h"
#include "run.h"
#include "run_split.h"

namespace fxprune {
namespace {

using Shape = std::vector<int64_t>;  // without the batch
constexpr int64_t kMostFloats = int64_t{1}
                                << 40;  // of one value and image, so that no sum of them overflows

int64_t floats(const Shape& shape) {
  int64_t size = 1;
  for (int64_t s : shape) {
    STD_TORCH_CHECK(!__builtin_mul_overflow(size, s, &size) && size <= kMostFloats,
                    "a value of a region is too large");
  }
  return size;
}

// Equal, or a channel vector beside an image of one pixel.
bool same_value(const Shape& a, const Shape& b) {
  return a == b || (a[0] == b[0] && floats(a) == a[0] && floats(b) == b[0]);
}

// Buffers that outlive a call, so that a call does not fault its pages in anew.
class ArenaPool {
 public:
  std::vector<float> take(int64_t count) {
    std::vector<float> arena;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!free_.empty()) {
        arena = std::move(free_.back());
        free_.pop_back();
      }
    }
    if (static_cast<int64_t>(arena.size()) < count) arena.resize(count);
    return arena;
  }
  void give(std::vector<float> arena) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(arena));
  }

 private:
  std::mutex mutex_;
  std::vector<std::vector<float>> free_;
};

ArenaPool& arenas() {
  static ArenaPool pool;
  return pool;
}

struct Value {
  Shape shape;
  int64_t uses = 0;
  int64_t last_use = -1;  // step, or the number of steps for a result
  int64_t offset = -1;    // in the arena, for values that are neither input nor result
  float* base = nullptr;  // of image 0, for inputs and results
};

struct Step {
  enum Code { kDepthwise, kGemm, kMean } code;
  int64_t x, residual = -1, gate = -1, out;
  DepthwiseTaps depthwise{};
  TileGemm gemm{};
  bool feature_major = false;
  bool feeds_next =
      false;  // its result is the next step's input and nothing else's, and is never stored
  int64_t values = 0;
};

class Region {
 public:
  Region(const std::vector<Tensor>& x, const std::vector<Tensor>& packed,
         const std::vector<int64_t>& program, const std::vector<int64_t>& outputs)
      : packed_(packed) {
    STD_TORCH_CHECK(!x.empty(), "region needs at least one input");
    for (const Tensor& t : x) {
      inputs_.push_back(float_input(t, "x"));
      STD_TORCH_CHECK(t.dim() >= 2 && t.size(0) == x[0].size(0),
                      "every region input must have shape (B, C, *) with one B, got ", shape_of(t));
      Value v;
      for (int64_t d = 1; d < t.dim(); ++d) v.shape.push_back(t.size(d));
      v.base = const_cast<float*>(data<float>(inputs_.back()));
      values_.push_back(std::move(v));
    }
    batch_ = x[0].size(0);
    for (size_t at = 0; at < program.size();) {
      STD_TORCH_CHECK(at + 2 <= program.size() && program[at + 1] >= 0 &&
                          at + 2 + program[at + 1] <= program.size(),
                      "program ends inside the record at ", at);
      read(program[at], {program.begin() + at + 2, program.begin() + at + 2 + program[at + 1]});
      at += 2 + program[at + 1];
    }
    for (int64_t id : outputs) {
      STD_TORCH_CHECK(
          id >= static_cast<int64_t>(x.size()) && id < static_cast<int64_t>(values_.size()),
          "outputs must name results of steps, got ", id);
      Value& v = values_[id];
      STD_TORCH_CHECK(v.base == nullptr, "outputs name value ", id, " twice");
      Shape shape = v.shape;
      shape.insert(shape.begin(), batch_);
      results_.push_back(empty_output(inputs_[0], shape));
      v.base = static_cast<float*>(results_.back().mutable_data_ptr());
      v.last_use = static_cast<int64_t>(steps_.size());
    }
    fuse();
    plan();
  }

  std::vector<Tensor> run() {
    const int64_t pool = torch::stable::get_num_threads();
    if (batch_ >= pool && pool > 1) {
      for_each_unit(batch_, pool, [&](int64_t image) { run_image(image, 1); });
    } else {
      for (int64_t image = 0; image < batch_; ++image) run_image(image, pool);
    }
    return std::move(results_);
  }

 private:
  const Tensor& weight(int64_t id) const {
    STD_TORCH_CHECK(id >= 0 && id < static_cast<int64_t>(packed_.size()), "packed tensor ", id,
                    " of ", packed_.size(), " does not exist");
    return packed_[id];
  }
  OptionalTensor optional_weight(int64_t id) const {
    return id < 0 ? OptionalTensor() : weight(id);
  }
  Value& use(int64_t id) {
    STD_TORCH_CHECK(id >= 0 && id < static_cast<int64_t>(values_.size()), "value ", id,
                    " is used before it exists");
    values_[id].last_use = static_cast<int64_t>(steps_.size());
    ++values_[id].uses;
    return values_[id];
  }
  const Tensor& keep(Tensor t) {
    kept_.push_back(std::move(t));
    return kept_.back();
  }
  const float* keep(const OptionalTensor& t) {
    return t.has_value() ? data<float>(keep(*t)) : nullptr;
  }

  void read(int64_t code, const std::vector<int64_t>& arg) {
    constexpr int64_t kCounts[] = {13, 12, 1};
    STD_TORCH_CHECK(code >= 0 && code <= 2, "unknown step code ", code);
    STD_TORCH_CHECK(static_cast<int64_t>(arg.size()) == kCounts[code], "step code ", code,
                    " takes ", kCounts[code], " arguments, got ", arg.size());
    Step step;
    step.code = static_cast<Step::Code>(code);
    step.x = arg[0];
    const Shape shape = use(arg[0]).shape;
    Value result;
    if (step.code == Step::kMean) {
      STD_TORCH_CHECK(shape.size() >= 2 && floats(shape) > 0, "mean needs a value with pixels");
      result.shape = {shape[0]};
    } else {
      const int64_t activation = arg.back();
      STD_TORCH_CHECK(activation >= 0 && activation < 9, "unknown activation ", activation);
      result.shape = step.code == Step::kDepthwise ? read_depthwise(&step, shape, arg)
                                                   : read_gemm(&step, shape, arg);
      (step.code == Step::kDepthwise ? step.depthwise.activation : step.gemm.activation) =
          static_cast<Activation>(activation);
    }
    floats(result.shape);  // checks its size
    step.out = static_cast<int64_t>(values_.size());
    values_.push_back(std::move(result));
    steps_.push_back(step);
  }

  Shape read_depthwise(Step* step, Shape shape, const std::vector<int64_t>& arg) {
    if (shape.size() == 1)
      shape.insert(shape.end(), {1, 1});  // a channel vector is an image of one pixel
    STD_TORCH_CHECK(shape.size() == 3, "depthwise needs (C, H, W) values");
    DepthwiseTaps& a = step->depthwise;
    a.batch = 1, a.channels = shape[0], a.height = shape[1], a.width = shape[2];
    constexpr int64_t kMost = int64_t{1} << 20;
    for (int i = 4; i < 12; ++i) {
      STD_TORCH_CHECK(arg[i] >= (i == 8 || i == 9 ? 0 : 1) && arg[i] <= kMost,
                      "depthwise geometry out of range");
    }
    a.kernel_h = arg[4], a.kernel_w = arg[5], a.stride_h = arg[6], a.stride_w = arg[7];
    a.pad_h = arg[8], a.pad_w = arg[9], a.dilation_h = arg[10], a.dilation_w = arg[11];
    read_taps(weight(arg[1]), weight(arg[2]), optional_weight(arg[3]), &a);
    tables_.push_back(std::make_unique<DepthwiseTables>(&a));
    return {a.channels, a.out_h, a.out_w};
  }

  void read_taps(const Tensor& weight, const Tensor& taps, const OptionalTensor& bias,
                 DepthwiseTaps* a) {
    kept_.push_back(check_taps(weight, taps, a));
    a->weight = data<float>(keep(float_input(weight, "weight")));
    a->bias = keep(float_input(bias, "bias", {a->channels}));
  }

  Shape read_gemm(Step* step, const Shape& shape, const std::vector<int64_t>& arg) {
    const bool first = arg[10] == 1;
    STD_TORCH_CHECK(arg[10] == 1 || arg[10] == -1, "feature_dim must be 1 or -1, got ", arg[10]);
    STD_TORCH_CHECK(!shape.empty() && (first ? shape.size() >= 2 : floats(shape) == shape[0]),
                    "gemm needs (K, *spatial) values with feature_dim=1, (K) or (K, 1, 1) with -1");
    TileGemm& a = step->gemm;
    structures_.emplace_back(weight(arg[2]), weight(arg[3]), weight(arg[4]), arg[9], arg[8],
                             shape[0], &a);
    step->values = structures_.back().values;
    check_shape(weight(arg[1]), "values", {step->values});
    a.values = data<float>(keep(float_input(weight(arg[1]), "values")));
    a.bias = keep(float_input(optional_weight(arg[5]), "bias", {a.n}));
    a.batch = 1;
    a.m = floats(shape) / std::max<int64_t>(shape[0], 1);
    Shape out = first ? shape : Shape{a.n};
    out[0] = a.n;
    step->residual = arg[6];
    step->gate = arg[7];
    if (arg[6] >= 0)
      STD_TORCH_CHECK(same_value(use(arg[6]).shape, out),
                      "the residual's shape differs from the result's");
    if (arg[7] >= 0)
      STD_TORCH_CHECK(first && floats(use(arg[7]).shape) == a.k,
                      "gate must hold one number per input feature");
    step->feature_major = first && (a.m > 1 || arg[7] >= 0);
    return out;
  }

  // PW -> DW pairs whose expanded value has no other reader.
  void fuse() {
    for (size_t s = 0; s + 1 < steps_.size(); ++s) {
      Step& step = steps_[s];
      const Step& next = steps_[s + 1];
      const Value& v = values_[step.out];
      const bool pair =
          step.code == Step::kGemm && next.code == Step::kDepthwise && next.x == step.out;
      const bool plain =
          step.feature_major && step.residual < 0 && step.gate < 0 && step.gemm.m > 0;
      step.feeds_next =
          pair && plain && v.uses == 1 && v.base == nullptr && can_expand_depthwise(step.gemm);
      // The pair runs as one, so its result must not take the room of its input.
      if (step.feeds_next)
        values_[step.x].last_use = std::max<int64_t>(values_[step.x].last_use, s + 1);
    }
  }

  // Offsets by first fit: a value's room is free again after its last use. Results of depthwise
  // steps have a zone of their own, which is cut by feature alike from step to step: a core writes
  // where it wrote before, and need not take the lines from another one.
  void plan() {
    for (const bool depthwise : {false, true}) plan_zone(depthwise);
  }

  void plan_zone(bool depthwise) {
    struct Room {
      int64_t offset, size, until;
    };
    const int64_t start = arena_;
    std::vector<Room> taken;  // by offset
    for (size_t s = 0; s < steps_.size(); ++s) {
      Value& v = values_[steps_[s].out];
      if ((steps_[s].code == Step::kDepthwise) != depthwise) continue;
      if (v.base != nullptr || steps_[s].feeds_next) continue;
      const int64_t now = static_cast<int64_t>(s), size = (floats(v.shape) + 15) / 16 * 16;
      taken.erase(
          std::remove_if(taken.begin(), taken.end(), [&](const Room& r) { return r.until < now; }),
          taken.end());
      int64_t offset = start;
      auto at = taken.begin();
      for (; at != taken.end() && at->offset - offset < size; ++at) offset = at->offset + at->size;
      taken.insert(at, {offset, size, std::max(v.last_use, now)});
      v.offset = offset;
      arena_ = std::max(arena_, offset + size);
    }
  }

  float* at(int64_t id, int64_t image, float* arena) const {
    const Value& v = values_[id];
    return v.base != nullptr ? v.base + image * floats(v.shape) : arena + v.offset;
  }

  void run_image(int64_t image, int64_t pool) const {
    std::vector<float> buffer = arenas().take(arena_ + 16);
    const uintptr_t address = reinterpret_cast<uintptr_t>(buffer.data());
    float* arena = reinterpret_cast<float*>((address + 63) & ~uintptr_t{63});
    for (size_t s = 0; s < steps_.size(); ++s) {
      if (steps_[s].feeds_next) {
        run_pair(steps_[s], steps_[s + 1], image, arena, pool);
        ++s;
      } else {
        run_step(steps_[s], image, arena, pool);
      }
    }
    arenas().give(std::move(buffer));
  }

  void run_pair(const Step& expand, const Step& depthwise, int64_t image, float* arena,
                int64_t pool) const {
    TileGemm g = expand.gemm;
    g.x = at(expand.x, image, arena);
    DepthwiseTaps d = depthwise.depthwise;
    d.out = at(depthwise.out, image, arena);
    run_expand_depthwise(g, d, pool);
  }

  void run_step(const Step& step, int64_t image, float* arena, int64_t pool) const {
    const float* x = at(step.x, image, arena);
    float* out = at(step.out, image, arena);
    if (step.code == Step::kMean) {
      const Shape& shape = values_[step.x].shape;
      kernels().channel_mean(x, out, shape[0], floats(shape) / shape[0]);
    } else if (step.code == Step::kDepthwise) {
      DepthwiseTaps a = step.depthwise;
      a.x = x, a.out = out;
      if (a.channels > 0) run_depthwise(a, pool);
    } else {
      TileGemm a = step.gemm;
      a.x = x, a.out = out;
      if (step.residual >= 0) a.residual = at(step.residual, image, arena);
      if (step.gate >= 0) a.gate = at(step.gate, image, arena);
      if (a.m == 0 || a.n == 0) return;
      if (splits_k(a, step.feature_major, pool)) {
        run_tile_gemm_split(a, step.values, pool);
      } else {
        run_tile_gemm(a, step.feature_major, step.values, pool);
      }
    }
  }

  const std::vector<Tensor>& packed_;
  std::vector<Tensor> inputs_, results_;
  std::deque<Tensor> kept_;
  std::deque<TileStructure> structures_;
  std::vector<std::unique_ptr<DepthwiseTables>> tables_;
  std::vector<Value> values_;
  std::vector<Step> steps_;
  int64_t batch_ = 0, arena_ = 0;
};

std::vector<Tensor> region_cpu(std::vector<Tensor> x, std::vector<Tensor> packed,
                               std::vector<int64_t> program, std::vector<int64_t> outputs) {
  return Region(x, packed, program, outputs).run();
}

}  // namespace
}  // namespace fxprune

STABLE_TORCH_LIBRARY_IMPL(fxprune, CPU, m) {
  m.impl("region", TORCH_BOX(&fxprune::region_cpu));
}
