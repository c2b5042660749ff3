// What a region knows of its values and steps before it runs: which steps run together, and where
// each value lies.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "caches.h"
#include "check.h"
#include "run.h"
#include "run_bf16.h"
#include "run_conv.h"

namespace fxprune {

using Shape = std::vector<int64_t>;  // without the batch
constexpr int64_t kMostNumbers = int64_t{1}
                                 << 40;  // of one value and image, so that no sum of them overflows

inline int64_t floats(const Shape& shape) {
  int64_t size = 1;
  for (int64_t s : shape) {
    STD_TORCH_CHECK(!__builtin_mul_overflow(size, s, &size) && size <= kMostNumbers,
                    "a value of a region is too large");
  }
  return size;
}

// Equal, or a channel vector beside an image of one pixel.
inline bool same_value(const Shape& a, const Shape& b) {
  return a == b || (a[0] == b[0] && floats(a) == a[0] && floats(b) == b[0]);
}

struct Value {
  Shape shape;
  int64_t uses = 0;
  int64_t last_use = -1;  // step, or the number of steps for a result
  int64_t gap = 0;        // numbers between two features' pixels in the arena
  enum Place {
    kArena,    // one image's, at `offset` of the early or the late part
    kRows,     // of the tail: image by image, at `offset` of a room of their own
    kOutside,  // an input or a result: image by image
  } place = kArena;
  int64_t offset = -1;
  bool late = false;  // read by a late step
};

template <class T>
struct StepOf {
  enum Code { kDepthwise, kGemm, kMean, kConv, kPool, kNorm, kAttention } code;
  int64_t x, residual = -1, gate = -1, k = -1, v = -1, mask = -1, out;
  // Weights in the bundle, -1 where there is none.
  int64_t values = -1;  // of a depthwise step and of a norm: the weight
  int64_t index = -1, tile_ptr = -1, columns = -1, taps = -1, bias = -1;
  DepthwiseTapsOf<T> depthwise{};
  TileGemmOf<T> gemm{};
  TileConvOf<T> conv{};
  MaxPoolOf<T> pool{};
  ChannelNormOf<T> norm{};
  AttentionBf16 attention{};

  // What it reads and writes, -1 where there is none.
  std::array<int64_t, 7> values_of() const { return {x, residual, gate, k, v, mask, out}; }

  Activation& activation() {
    return code == kDepthwise ? depthwise.activation
           : code == kGemm    ? gemm.activation
                              : conv.activation;
  }
  bool feature_major = false;
  bool feeds_next = false;  // its result is the next step's input and nothing else's, and is not
                            // stored when both run as one
  int64_t block = 0;  // steps from this one on that may run as one, band by band (run_block.h)
};

// T: float or Bf16.
template <class T>
class RegionPlan {
 public:
  static constexpr int64_t kTogether = 4;  // images that take late steps in turn

  using Step = StepOf<T>;
  static constexpr bool kBf16 = std::is_same_v<T, Bf16>;

  // Fills in what values and steps say of their places; both must outlive it.
  RegionPlan(std::vector<Value>* values, std::vector<Step>* steps, int64_t batch)
      : values_(*values), steps_(*steps), batch_(batch) {
    fuse();
    align();
    find_tail();
    find_late();
    place();
  }

  // Numbers, per image, of the values that late steps read, and of the others.
  int64_t late_arena() const { return arena_[1]; }
  int64_t early_arena() const { return arena_[0]; }
  int64_t rows() const { return rows_; }  // numbers, of the values of the tail
  size_t tail() const { return tail_; }   // the steps from here on run for all images at once
  size_t late() const { return late_; }   // and those from here on for a few images in turn

 private:
  // PW -> DW pairs whose expanded value has no other reader, and blocks of steps.
  void fuse() {
    for (size_t s = 0; s + 1 < steps_.size(); ++s) {
      Step& step = steps_[s];
      const Step& next = steps_[s + 1];
      const bool pair =
          step.code == Step::kGemm && next.code == Step::kDepthwise && feeds(step, next);
      const bool plain =
          step.feature_major && step.residual < 0 && step.gate < 0 && step.gemm.m > 0;
      step.feeds_next = pair && plain && can_expand_depthwise(step.gemm);
      // The pair runs as one, so its result must not take the room of its input.
      step.block = block_at(s);
      const int64_t last = std::max<int64_t>(step.feeds_next, step.block - 1);
      values_[step.x].last_use = std::max<int64_t>(values_[step.x].last_use, s + last);
    }
  }

  // Steps of the block that begins at `s`: an expanding pair and the product that reads it; a
  // convolution, the depthwise one that reads it, and its product if there is one; or two products.
  int64_t block_at(size_t s) const {
    const Step& step = steps_[s];
    if (are_products(s)) return 2;
    // In bfloat16 a larger convolution is a step of its own.
    const bool conv =
        !kBf16 && step.code == Step::kConv && step.residual < 0 && step.conv.tiles > 0;
    if (!(step.feeds_next || conv) || s + 1 == steps_.size()) return 0;
    const Step& next = steps_[s + 1];
    if (!feeds(step, next) || next.code != Step::kDepthwise || !next.depthwise.vectorised() ||
        next.depthwise.channels == 0 || next.depthwise.out_h * next.depthwise.out_w == 0)
      return 0;
    if (s + 2 < steps_.size()) {
      const Step& last = steps_[s + 2];
      if (feeds(next, last) && last.code == Step::kGemm && last.gate < 0 && takes_gaps(last) &&
          last.gemm.n > 0)
        return 3;
    }
    return conv ? 2 : 0;
  }
  // True where `s` is the product of a block: its result is stored, whatever else it may feed.
  bool ends_block(size_t s) const { return s >= 2 && steps_[s - 2].block == 3; }
  // True where the result of `s` takes the place of what is added to it, which then stays in a
  // core's cache: nobody reads it any more, and every kernel reads each number of it right before
  // it writes that of the result. What runs as one with `s` may read its inputs later.
  bool adds_in_place(size_t s) const {
    const Step& step = steps_[s];
    if (step.residual < 0) return false;
    const Value &v = values_[step.out], &added = values_[step.residual];
    if (added.place != Value::kArena || added.last_use != static_cast<int64_t>(s)) return false;
    if (added.late != v.late || numbers(added) != numbers(v) || added.gap != v.gap) return false;
    size_t begin = s;
    for (size_t t = s - std::min<size_t>(s, 2); t < s; ++t)
      if (t + std::max<int64_t>(steps_[t].block, 1) > s) begin = std::min(begin, t);
    for (size_t t = begin; t <= s; ++t) {
      std::array<int64_t, 7> ids = steps_[t].values_of();
      if (t == s) ids[1] = ids[6] = -1;  // the residual itself, and the result
      if (std::count(ids.begin(), ids.end(), step.residual)) return false;
    }
    return true;
  }
  // Two 1x1 convolutions, unless the second one begins a block of its own.
  bool are_products(size_t s) const {
    const Step &step = steps_[s], &next = steps_[s + 1];
    if (!feeds(step, next) || step.residual >= 0 || step.gate >= 0 || next.gate >= 0) return false;
    for (const Step* product : {&step, &next})
      if (product->code != Step::kGemm || !takes_gaps(*product) || product->gemm.n == 0)
        return false;
    return s + 2 == steps_.size() || steps_[s + 2].code != Step::kDepthwise ||
           !feeds(next, steps_[s + 2]);
  }
  // True where `next` reads the result of `step`, and nobody else does.
  bool feeds(const Step& step, const Step& next) const {
    const Value& v = values_[step.out];
    return next.x == step.out && v.uses == 1 && v.place == Value::kArena;
  }

  // Features begin at cache lines where every kernel that reads or writes the value can do with
  // that: vectors then do not straddle two lines.
  void align() {
    for (const Step& step : steps_) {
      Value& v = values_[step.out];
      const int64_t pixels = v.shape.size() == 3 ? v.shape[1] * v.shape[2] : 0;
      if (v.place == Value::kArena && pixels > kLine) v.gap = (kLine - pixels % kLine) % kLine;
    }
    for (const Step& step : steps_) {
      if (takes_gaps(step)) continue;
      for (const int64_t id : {step.x, step.residual, step.out})
        if (id >= 0) values_[id].gap = 0;
    }
  }
  static bool takes_gaps(const Step& step) {
    return step.code == Step::kDepthwise || step.code == Step::kPool || step.code == Step::kNorm ||
           step.code == Step::kMean || step.code == Step::kAttention ||
           (step.code == Step::kGemm && step.feature_major && !runs_panel(step.gemm));
  }
  static bool runs_panel(const TileShape& gemm) {
    return !kBf16 && uses_panel(gemm, true, kernels().width);
  }
  static int64_t numbers(const Value& v) {
    return floats(v.shape) + (v.shape.empty() ? 0 : v.shape[0] * v.gap);
  }

  // Values of the tail are rows that follow each other, image by image, in a room of their own.
  void find_tail() {
    tail_ = steps_.size();
    if (batch_ == 1) return;
    const auto multiplies_rows = [](const Step& s) {
      return s.code == Step::kGemm && !s.feature_major && s.gate < 0;
    };
    while (tail_ > 0 && multiplies_rows(steps_[tail_ - 1])) --tail_;
    for (size_t s = tail_; s < steps_.size(); ++s) {
      for (const int64_t id : {steps_[s].x, steps_[s].residual, steps_[s].out}) {
        if (id < 0 || values_[id].place != Value::kArena) continue;
        values_[id].place = Value::kRows;
        values_[id].offset = rows_;
        rows_ += (batch_ * floats(values_[id].shape) + kLine - 1) / kLine * kLine;
      }
    }
  }

  // Late steps, whose values are so small that those of kTogether images stay in L2 beside the
  // weights: these are then read from beyond it once for all of them.
  void find_late() {
    late_ = tail_;
    if (batch_ == 1) return;
    while (late_ > 0) {
      const Step& step = steps_[late_ - 1];
      int64_t count = 0;
      for (const int64_t id : step.values_of())
        if (id >= 0) count += numbers(values_[id]);
      if (count * static_cast<int64_t>(sizeof(T)) > of_l2(kLateBytes)) break;
      --late_;
    }
    for (size_t s = late_; s < tail_; ++s) {
      for (const int64_t id : steps_[s].values_of())
        if (id >= 0) values_[id].late = true;
    }
  }

  // Offsets by first fit: a value's room is free again after its last use. Results of depthwise
  // steps have a zone of their own, which is cut by feature alike from step to step: a core writes
  // where it wrote before, and need not take the lines from another one.
  void place() {
    for (const bool late : {false, true}) {
      for (const bool depthwise : {false, true}) plan_zone(depthwise, late);
    }
  }

  void plan_zone(bool depthwise, bool late) {
    struct Room {
      int64_t offset, size, until;
    };
    int64_t& arena = arena_[late];
    const int64_t start = arena;
    std::vector<Room> taken;  // by offset
    for (size_t s = 0; s < steps_.size(); ++s) {
      Value& v = values_[steps_[s].out];
      if ((steps_[s].code == Step::kDepthwise) != depthwise) continue;
      if (v.place != Value::kArena || v.late != late) continue;
      if (steps_[s].feeds_next && !ends_block(s)) continue;
      const int64_t now = static_cast<int64_t>(s), size = (numbers(v) + kLine - 1) / kLine * kLine;
      taken.erase(
          std::remove_if(taken.begin(), taken.end(), [&](const Room& r) { return r.until < now; }),
          taken.end());
      if (adds_in_place(s)) {
        const int64_t place = values_[steps_[s].residual].offset;
        const auto added = std::find_if(taken.begin(), taken.end(),
                                        [&](const Room& r) { return r.offset == place; });
        if (added != taken.end()) {
          v.offset = place;
          added->until = std::max(v.last_use, now);
          continue;
        }
      }
      int64_t offset = start;
      auto at = taken.begin();
      for (; at != taken.end() && at->offset - offset < size; ++at) offset = at->offset + at->size;
      taken.insert(at, {offset, size, std::max(v.last_use, now)});
      v.offset = offset;
      arena = std::max(arena, offset + size);
    }
  }

  static constexpr int64_t kLine = 64 / sizeof(T);  // numbers of a cache line
  static constexpr int64_t kLateBytes = 320 * 1024;

  std::vector<Value>& values_;
  std::vector<Step>& steps_;
  int64_t batch_, arena_[2] = {0, 0}, rows_ = 0;
  size_t tail_ = 0, late_ = 0;
};

}  // namespace fxprune
