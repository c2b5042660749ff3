// The program of a region, read and checked.
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
//
// x, residual and gate are values: first the inputs, then one per step. Weights are parts of a
// bundle. -1 is absent.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <deque>
#include <memory>
#include <optional>
#include <vector>

#include "bundle.h"
#include "check.h"
#include "region_plan.h"
#include "run.h"
#include "run_bf16.h"
#include "run_conv.h"

namespace fxprune {

// T: float or Bf16, what every value in the region is. Holds what the steps point to.
template <class T>
class RegionProgram {
 public:
  using Value = ValueOf<T>;
  using Step = StepOf<T>;
  static constexpr bool kBf16 = std::is_same_v<T, Bf16>;

  RegionProgram(const std::vector<Tensor>& x, const Bundle& weights,
                const std::vector<int64_t>& program, const std::vector<int64_t>& outputs)
      : weights_(weights) {
    for (const Tensor& t : x) {
      inputs_.push_back(input(t, "x"));
      STD_TORCH_CHECK(t.dim() >= 2 && t.size(0) == x[0].size(0),
                      "every region input must have shape (B, C, *) with one B, got ", shape_of(t));
      Value v;
      for (int64_t d = 1; d < t.dim(); ++d) v.shape.push_back(t.size(d));
      v.base = const_cast<T*>(data<T>(inputs_.back()));
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
      v.base = static_cast<T*>(results_.back().mutable_data_ptr());
      v.last_use = static_cast<int64_t>(steps_.size());
    }
    plan_.emplace(&values_, &steps_, batch_);
  }

  const std::vector<Value>& values() const { return values_; }
  const std::vector<Step>& steps() const { return steps_; }
  int64_t batch() const { return batch_; }
  const RegionPlan<T>& plan() const { return *plan_; }
  std::vector<Tensor> take_results() { return std::move(results_); }

 private:
  Value& use(int64_t id) {
    STD_TORCH_CHECK(id >= 0 && id < static_cast<int64_t>(values_.size()), "value ", id,
                    " is used before it exists");
    values_[id].last_use = static_cast<int64_t>(steps_.size());
    ++values_[id].uses;
    return values_[id];
  }
  // A weight or bias of `size` numbers, which kernels read as float.
  const float* floats_of(int64_t id, const char* name, int64_t size) {
    if (kBf16 && weights_.is_bf16(id))
      return wide_.emplace_back(weights_.get<Bf16>(id, name, size)).data();
    return weights_.get<float>(id, name, size).data;
  }
  const float* bias(int64_t id, int64_t size) {
    return id < 0 ? nullptr : floats_of(id, "bias", size);
  }
  // The values of a tile-packed weight of `nnz` numbers as its kernels take them.
  const T* values_of(int64_t id, int64_t nnz, const TileShape& a) {
    if constexpr (kBf16) {
      const bool image = weights_.is_image(id);
      return images_.emplace_back(weights_.get<Bf16>(id, "values"), image, nnz, a).data();
    } else {
      return floats_of(id, "values", nnz);
    }
  }
  // values, index, tile_ptr and columns are arguments in a row
  TileLists lists(const int64_t* arg) const {
    return {weights_.get<int32_t>(arg[1], "index"), weights_.get<int32_t>(arg[2], "tile_ptr"),
            weights_.get<int32_t>(arg[3], "columns")};
  }
  static Tensor input(const Tensor& t, const char* name) {
    return kBf16 ? bf16_input(t, name) : float_input(t, name);
  }

  void read(int64_t code, const std::vector<int64_t>& arg) {
    constexpr int64_t kCounts[] = {13, 12, 1, 19, 9, 4};
    STD_TORCH_CHECK(code >= 0 && code <= 5, "unknown step code ", code);
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
    check_taps(weights_.get<int64_t>(arg[2], "taps"), &a);
    a.weight = floats_of(arg[1], "weight", a.channels * a.kernel());
    a.bias = bias(arg[3], a.channels);
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
    a.values = values_of(arg[1], check_tiles(lists(&arg[1]), arg[9], arg[8], shape[0], &a), a);
    a.bias = bias(arg[5], a.n);
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
    a.values = values_of(arg[1], check_conv(lists(&arg[1]), arg[8], arg[7], &a), a);
    a.bias = bias(arg[5], a.n);
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
    a.weight = bias(arg[1], a.channels), a.bias = bias(arg[2], a.channels);
    STD_TORCH_CHECK(arg[3] >= 0 && arg[3] < kInfinityBits, "eps must be the bits of a float >= 0");
    const uint32_t bits = static_cast<uint32_t>(arg[3]);
    std::memcpy(&a.eps, &bits, sizeof(bits));
    return shape;
  }

  static constexpr int64_t kInfinityBits = 0x7F800000;

  const Bundle& weights_;
  std::vector<Tensor> inputs_, results_;
  std::deque<TileImage> images_;
  std::deque<Widened> wide_;
  std::vector<std::shared_ptr<const void>> tables_;
  std::vector<Value> values_;
  std::vector<Step> steps_;
  int64_t batch_ = 0;
  std::optional<RegionPlan<T>> plan_;
};

}  // namespace fxprune
