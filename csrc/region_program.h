// The program of a region, read and checked: all that does not depend on what tensors hold, so that
// it is done once and not on every call. The text is numbers between spaces:
//
//   record: code, count, then `count` arguments
//   depthwise (0): x, weight, taps, bias, kernel h w, stride h w, padding h w, dilation h w,
//                  activation
//   gemm (1):      x, values, index, tile_ptr, columns, bias, residual, gate, out_features,
//                  granularity, feature_dim, activation
//   mean (2):      x
//   conv (3):      x, values, index, tile_ptr, columns, bias, residual, out_features, granularity,
//                  kernel h w, stride h w, padding h w, dilation h w, groups, activation
//   max pool (4):  x, kernel h w, stride h w, padding h w, dilation h w
//   norm (5):      x, weight, bias, the bits of eps as a float
//   attention (6): x, k, v, mask, heads, the bits of scale as a float
//
// x, residual, gate, k, v and mask are values: first the inputs, then one per step. Weights are
// parts of a bundle. -1 is absent.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bundle.h"
#include "check_attention.h"
#include "check_packed.h"
#include "region_plan.h"
#include "run.h"
#include "run_bf16.h"
#include "run_conv.h"

namespace fxprune {

inline std::vector<int64_t> numbers_in(const std::string& text, const char* name) {
  std::vector<int64_t> numbers;
  const char *at = text.data(), *end = at + text.size();
  while (at != end) {
    int64_t number;
    const auto [next, error] = std::from_chars(at, end, number);
    STD_TORCH_CHECK(error == std::errc() && (next == end || *next == ' '), name,
                    " must hold integers with a space between them, got '",
                    std::string(at, std::min<size_t>(end - at, 24)), "'");
    numbers.push_back(number);
    at = next == end ? end : next + 1;
  }
  return numbers;
}

// T: float or Bf16, what every value in the region is. Immutable; steps lack what points to data.
template <class T>
class RegionProgram {
 public:
  using Step = StepOf<T>;
  static constexpr bool kBf16 = std::is_same_v<T, Bf16>;

  // inputs: their shapes, batch included. types: of the tensors that hold the weights.
  RegionProgram(const std::vector<Shape>& inputs, const std::vector<int32_t>& types,
                const std::string& layout, const std::string& text,
                const std::vector<int64_t>& outputs)
      : layout_(numbers_in(layout, "layout"), types), outputs_(outputs), batch_(inputs[0][0]) {
    for (const Shape& shape : inputs) {
      Value v;
      v.shape.assign(shape.begin() + 1, shape.end());
      v.place = Value::kOutside;
      values_.push_back(std::move(v));
    }
    const std::vector<int64_t> program = numbers_in(text, "program");
    for (size_t at = 0; at < program.size();) {
      STD_TORCH_CHECK(at + 2 <= program.size() && program[at + 1] >= 0 &&
                          program[at + 1] <= static_cast<int64_t>(program.size() - at - 2),
                      "program ends inside the record at ", at);
      read(program[at], {program.begin() + at + 2, program.begin() + at + 2 + program[at + 1]});
      at += 2 + program[at + 1];
    }
    for (int64_t id : outputs) {
      STD_TORCH_CHECK(
          id >= static_cast<int64_t>(inputs.size()) && id < static_cast<int64_t>(values_.size()),
          "outputs must name results of steps, got ", id);
      Value& v = values_[id];
      STD_TORCH_CHECK(v.place == Value::kArena, "outputs name value ", id, " twice");
      v.place = Value::kOutside;
      v.last_use = static_cast<int64_t>(steps_.size());
    }
    plan_.emplace(&values_, &steps_, batch_);
  }
  RegionProgram(const RegionProgram&) = delete;
  RegionProgram& operator=(const RegionProgram&) = delete;

  const BundleLayout& layout() const { return layout_; }
  const std::vector<Value>& values() const { return values_; }
  const std::vector<Step>& steps() const { return steps_; }
  const std::vector<int64_t>& outputs() const { return outputs_; }  // values
  const RegionPlan<T>& plan() const { return *plan_; }
  int64_t batch() const { return batch_; }

 private:
  Value& use(int64_t id) {
    STD_TORCH_CHECK(id >= 0 && id < static_cast<int64_t>(values_.size()), "value ", id,
                    " is used before it exists");
    values_[id].last_use = static_cast<int64_t>(steps_.size());
    ++values_[id].uses;
    return values_[id];
  }
  // A weight or bias of `size` numbers, which kernels read as float.
  int64_t floats_of(int64_t id, const char* name, int64_t size) {
    const bool wide = kBf16 && layout_.is_bf16(id);
    const int64_t found = wide ? layout_.size<Bf16>(id, name) : layout_.size<float>(id, name);
    STD_TORCH_CHECK(found == size, name, " must hold ", size, " numbers, got ", found);
    return id;
  }
  int64_t bias(int64_t id, int64_t size) { return id < 0 ? -1 : floats_of(id, "bias", size); }
  // values, index, tile_ptr and columns are arguments in a row
  TileSizes lists(const int64_t* arg, Step* step) {
    step->values = arg[0], step->index = arg[1], step->tile_ptr = arg[2], step->columns = arg[3];
    layout_.size<T>(arg[0], "values");
    return {layout_.size<int32_t>(arg[1], "index"), layout_.size<int32_t>(arg[2], "tile_ptr"),
            layout_.size<int32_t>(arg[3], "columns")};
  }

  void read(int64_t code, const std::vector<int64_t>& arg) {
    constexpr int64_t kCounts[] = {13, 12, 1, 19, 9, 4, 6};
    STD_TORCH_CHECK(code >= 0 && code <= 6, "unknown step code ", code);
    STD_TORCH_CHECK(static_cast<int64_t>(arg.size()) == kCounts[code], "step code ", code,
                    " takes ", kCounts[code], " arguments, got ", arg.size());
    Step step;
    step.code = static_cast<typename Step::Code>(code);
    step.x = arg[0];
    const Shape shape = use(arg[0]).shape;
    Value result;
    if (step.code == Step::kMean) {
      STD_TORCH_CHECK(shape.size() >= 2 && floats(shape) > 0, "mean needs a value with pixels");
      result.shape = {shape[0]};
    } else if (step.code == Step::kPool) {
      result.shape = read_pool(&step, shape, arg);
    } else if (step.code == Step::kNorm) {
      result.shape = read_norm(&step, shape, arg);
    } else if (step.code == Step::kAttention) {
      result.shape = read_attention(&step, shape, arg);
    } else {
      const int64_t activation = arg.back();
      STD_TORCH_CHECK(activation >= 0 && activation < 9, "unknown activation ", activation);
      step.activation() = static_cast<Activation>(activation);
      result.shape = step.code == Step::kDepthwise ? read_depthwise(&step, shape, arg)
                     : step.code == Step::kGemm    ? read_gemm(&step, shape, arg)
                                                   : read_conv(&step, shape, arg);
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
    DepthwiseShape& a = step->depthwise;
    a.batch = 1, a.channels = shape[0], a.height = shape[1], a.width = shape[2];
    read_window(&arg[4], &a);
    check_window(&a);
    check_tap_count(layout_.size<int64_t>(arg[2], "taps"), &a);
    step->values = floats_of(arg[1], "weight", a.channels * a.kernel());
    step->taps = arg[2];
    step->bias = bias(arg[3], a.channels);
    tables_.push_back(depthwise_tables<T>(&a));
    return {a.channels, a.out_h, a.out_w};
  }

  // kernel h w, stride h w, padding h w, dilation h w
  template <class Conv>
  static void read_window(const int64_t* arg, Conv* a) {
    constexpr int64_t kMost = int64_t{1} << 20;
    for (int i = 0; i < 8; ++i) {
      STD_TORCH_CHECK(arg[i] >= (i == 4 || i == 5 ? 0 : 1) && arg[i] <= kMost,
                      "the window's geometry is out of range");
    }
    a->kernel_h = arg[0], a->kernel_w = arg[1], a->stride_h = arg[2], a->stride_w = arg[3];
    a->pad_h = arg[4], a->pad_w = arg[5], a->dilation_h = arg[6], a->dilation_w = arg[7];
  }

  Shape read_gemm(Step* step, const Shape& shape, const std::vector<int64_t>& arg) {
    const bool first = arg[10] == 1;
    STD_TORCH_CHECK(arg[10] == 1 || arg[10] == -1, "feature_dim must be 1 or -1, got ", arg[10]);
    STD_TORCH_CHECK(!shape.empty() && (first ? shape.size() >= 2 : floats(shape) == shape[0]),
                    "gemm needs (K, *spatial) values with feature_dim=1, (K) or (K, 1, 1) with -1");
    TileGemmOf<T>& a = step->gemm;
    check_tile_sizes(lists(&arg[1], step), arg[9], arg[8], shape[0], &a);
    step->bias = bias(arg[5], a.n);
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

  Shape read_conv(Step* step, const Shape& shape, const std::vector<int64_t>& arg) {
    STD_TORCH_CHECK(shape.size() == 3, "conv needs (C, H, W) values");
    TileConvOf<T>& a = step->conv;
    a.batch = 1, a.channels = shape[0], a.height = shape[1], a.width = shape[2];
    a.groups = arg[17];
    read_window(&arg[9], &a);
    check_conv_sizes(lists(&arg[1], step), arg[8], arg[7], &a);
    step->bias = bias(arg[5], a.n);
    Shape out = {a.n, a.out_h, a.out_w};
    floats(out);  // checks its size
    step->residual = arg[6];
    if (arg[6] >= 0)
      STD_TORCH_CHECK(same_value(use(arg[6]).shape, out),
                      "the residual's shape differs from the result's");
    const auto tables = conv_tables(&a);
    STD_TORCH_CHECK(tables->fits(), "the rows of x that one output row reads are too large");
    tables_.push_back(tables);
    return out;
  }

  Shape read_pool(Step* step, const Shape& shape, const std::vector<int64_t>& arg) {
    STD_TORCH_CHECK(shape.size() == 3, "max pool needs (C, H, W) values");
    MaxPoolOf<T>& a = step->pool;
    a.channels = shape[0], a.height = shape[1], a.width = shape[2];
    read_window(&arg[1], &a);
    check_window(&a);
    STD_TORCH_CHECK(2 * a.pad_h <= a.dilation_h * (a.kernel_h - 1) + 1 &&
                        2 * a.pad_w <= a.dilation_w * (a.kernel_w - 1) + 1,
                    "the padding of max pool must be at most half of its window");
    return {a.channels, a.out_h, a.out_w};
  }

  Shape read_norm(Step* step, const Shape& shape, const std::vector<int64_t>& arg) {
    STD_TORCH_CHECK(!shape.empty(), "norm needs (C, *spatial) values");
    ChannelNormOf<T>& a = step->norm;
    a.channels = shape[0], a.size = floats(shape) / std::max<int64_t>(shape[0], 1);
    step->values = bias(arg[1], a.channels), step->bias = bias(arg[2], a.channels);
    a.eps = float_of(arg[3], "eps");
    return shape;
  }

  Shape read_attention(Step* step, const Shape& shape, const std::vector<int64_t>& arg) {
    STD_TORCH_CHECK(kBf16, "attention needs bfloat16 values");
    const Shape keys = use(arg[1]).shape;
    STD_TORCH_CHECK(shape.size() == 2 && keys.size() == 2 && keys[0] == shape[0],
                    "attention needs (features, queries) and (features, keys) values");
    STD_TORCH_CHECK(use(arg[2]).shape == keys, "attention's v must have the shape of its k");
    check_attention(shape[0], shape[1], keys[1], arg[4], float_of(arg[5], "scale"),
                    &step->attention);
    if (arg[3] >= 0)
      STD_TORCH_CHECK((use(arg[3]).shape == Shape{keys[1], shape[1]}),
                      "attention's mask must be a (keys, queries) value");
    step->k = arg[1], step->v = arg[2], step->mask = arg[3];
    return shape;
  }

  // The float >= 0 that has these bits.
  static float float_of(int64_t bits, const char* name) {
    STD_TORCH_CHECK(bits >= 0 && bits < kInfinityBits, name, " must be the bits of a float >= 0");
    const uint32_t word = static_cast<uint32_t>(bits);
    float value;
    std::memcpy(&value, &word, sizeof(value));
    return value;
  }

  static constexpr int64_t kInfinityBits = 0x7F800000;

  BundleLayout layout_;
  std::vector<int64_t> outputs_;
  std::vector<std::shared_ptr<const void>> tables_;
  std::vector<Value> values_;
  std::vector<Step> steps_;
  int64_t batch_ = 0;
  std::optional<RegionPlan<T>> plan_;
};

}  // namespace fxprune
