// What every operator demands of its arguments, checked before any memory is touched.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "fxprune/kernels.h"

namespace fxprune {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A string argument that owns its characters: torch's own conversion to std::string leaks one
// string a call.
struct Text {
  std::string value;
};

inline std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + ")";
}

// Element types as torch's C interface numbers them; asked for once, since every call compares
// them.
struct ElementTypes {
  int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16(),
          int32 = aoti_torch_dtype_int32(), int64 = aoti_torch_dtype_int64();
};

inline const ElementTypes& element_types() {
  static const ElementTypes types;
  return types;
}

inline int32_t type_of(const Tensor& t) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type));
  return type;
}

inline void check_tensor(const Tensor& t, const char* name, int32_t type, const char* type_name) {
  STD_TORCH_CHECK(type_of(t) == type, name, " must be ", type_name);
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
}

// A weight and its bias beside float32 activations.
inline void check_floats(const Tensor& weight, const char* weight_name, const OptionalTensor& bias,
                         const char* bias_name) {
  check_tensor(weight, weight_name, element_types().float32, "float32");
  if (bias.has_value()) check_tensor(*bias, bias_name, element_types().float32, "float32");
}

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

// Whether activations are bfloat16; anything but that and float32 is refused.
inline bool is_bf16(const Tensor& t, const char* name) {
  const int32_t type = type_of(t);
  STD_TORCH_CHECK(type == element_types().float32 || type == element_types().bfloat16, name,
                  " must be float32 or bfloat16");
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  return type == element_types().bfloat16;
}

// An uninitialised tensor of the type of `like`. Directly by the C interface:
// torch::stable::new_empty looks the operator up by name and boxes its arguments, which takes as
// long as a small kernel.
inline Tensor empty_output(const Tensor& like, const std::vector<int64_t>& shape) {
  int32_t type = type_of(like);
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), shape.data(),
                                                          static_cast<int64_t>(shape.size()), &type,
                                                          nullptr, nullptr, 0, nullptr, &handle));
  return Tensor(handle);
}

inline void check_shape(const Tensor& t, const char* name, const std::vector<int64_t>& expected) {
  bool same = t.dim() == static_cast<int64_t>(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) same = t.size(i) == expected[i];
  if (same) return;
  std::string text;
  for (int64_t size : expected) text += (text.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(false, name, " must have shape (", text, "), got ", shape_of(t));
}

// A float32 argument, made contiguous. Absent optionals stay absent.
inline Tensor float_input(const Tensor& t, const char* name) {
  check_tensor(t, name, element_types().float32, "float32");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline OptionalTensor float_input(const OptionalTensor& t, const char* name,
                                  const std::vector<int64_t>& shape) {
  if (!t.has_value()) return t;
  check_shape(*t, name, shape);
  return float_input(*t, name);
}

template <class T = float>
const T* data_or_null(const OptionalTensor& t) {
  return t.has_value() ? data<T>(*t) : nullptr;
}

// A bfloat16 argument, made contiguous.
inline Tensor bf16_input(const Tensor& t, const char* name) {
  check_tensor(t, name, element_types().bfloat16, "bfloat16, as x is");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline OptionalTensor bf16_input(const OptionalTensor& t, const char* name,
                                 const std::vector<int64_t>& shape) {
  if (!t.has_value()) return t;
  check_shape(*t, name, shape);
  return bf16_input(*t, name);
}

// Numbers that lie one after the other: a contiguous tensor's, or a part of one.
template <class T>
struct Span {
  const T* data;
  int64_t size;
};

template <class T>
Span<T> span_of(const Tensor& t) {
  return {data<T>(t), t.numel()};
}

// Weights and biases that kernels read as float whatever the activations are: float32, or bfloat16
// that is widened.
class Widened {
 public:
  Widened(const OptionalTensor& t, const char* name, const std::vector<int64_t>& shape) {
    if (!t.has_value()) return;
    check_shape(*t, name, shape);
    kept_ = t->is_contiguous() ? *t : torch::stable::contiguous(*t);
    if (is_bf16(*t, name)) {
      widen_from(span_of<Bf16>(*kept_));
    } else {
      data_ = fxprune::data<float>(*kept_);
    }
  }
  explicit Widened(const Span<Bf16>& from) { widen_from(from); }
  Widened(const Widened&) = delete;
  Widened& operator=(const Widened&) = delete;
  const float* data() const { return data_; }

 private:
  void widen_from(const Span<Bf16>& from) {
    wide_.resize(from.size);
    for (size_t i = 0; i < wide_.size(); ++i) wide_[i] = widen(from.data[i]);
    data_ = wide_.data();
  }

  OptionalTensor kept_;
  std::vector<float> wide_;
  const float* data_ = nullptr;
};

inline Activation check_activation(const Text& name) {
  Activation activation;
  if (parse_activation(name.value.c_str(), &activation)) return activation;
  std::string legal;
  for (const char* word : kActivationNames)
    legal += (legal.empty() ? "" : ", ") + std::string(word);
  STD_TORCH_CHECK(false, "unknown activation '", name.value, "'; legal: ", legal);
}

// Sets the output size of a convolution.
template <class Conv>
void check_window(Conv* a) {
  const int64_t window_h = a->dilation_h * (a->kernel_h - 1) + 1,
                window_w = a->dilation_w * (a->kernel_w - 1) + 1;
  const int64_t reach_h = a->height + 2 * a->pad_h - window_h,
                reach_w = a->width + 2 * a->pad_w - window_w;
  STD_TORCH_CHECK(reach_h >= 0 && reach_w >= 0, "x of height and width (", a->height, ", ",
                  a->width, ") is smaller than the dilated window (", window_h, ", ", window_w,
                  ") with padding (", a->pad_h, ", ", a->pad_w, ")");
  a->out_h = reach_h / a->stride_h + 1;
  a->out_w = reach_w / a->stride_w + 1;
}

// Checks the tap masks of a depthwise convolution, one bit per tap that is kept, and sets them.
inline void check_taps(const Span<int64_t>& taps, DepthwiseShape* a) {
  a->tap_words = (a->kernel() + 63) / 64;
  STD_TORCH_CHECK(taps.size % a->tap_words == 0 && taps.size / a->tap_words == a->channels,
                  "taps must hold ", a->tap_words, " numbers for each of ", a->channels,
                  " channels, got ", taps.size);
  a->taps = reinterpret_cast<const uint64_t*>(taps.data);
  const int64_t used = a->kernel() % 64;
  if (used == 0) return;
  for (int64_t c = 0; c < a->channels; ++c) {
    const uint64_t last = a->taps[c * a->tap_words + a->tap_words - 1];
    STD_TORCH_CHECK(last >> used == 0, "taps of channel ", c, " set a bit past tap ",
                    a->kernel() - 1);
  }
}

// The same for tensors of shape (C, KH * KW) and (C, words). Returns the masks' owner.
inline Tensor check_taps(const Tensor& weight, const Tensor& taps_in, DepthwiseShape* a) {
  check_shape(weight, "weight", {a->channels, a->kernel()});
  check_tensor(taps_in, "taps", element_types().int64, "int64");
  check_shape(taps_in, "taps", {a->channels, (a->kernel() + 63) / 64});
  const Tensor taps = taps_in.is_contiguous() ? taps_in : torch::stable::contiguous(taps_in);
  check_taps(span_of<int64_t>(taps), a);
  return taps;
}

// The index lists of a tile-packed weight.
struct TileLists {
  Span<int32_t> index, tile_ptr, columns;
};

// Checks the lists and fills the structure's part of `a`, which points into them. Returns the
// number of packed weights.
inline int64_t check_tiles(const TileLists& lists, int64_t granularity, int64_t out_features,
                           int64_t in_features, TileShape* a) {
  STD_TORCH_CHECK(granularity >= 1, "granularity must be at least 1, got ", granularity);
  STD_TORCH_CHECK(out_features >= 0, "out_features must not be negative, got ", out_features);
  STD_TORCH_CHECK(in_features >= 0, "in_features must not be negative, got ", in_features);
  const int64_t kept = lists.columns.size, nnz = lists.index.size;
  granularity = std::min(granularity, std::max<int64_t>(kept, 1));  // no product below can overflow
  const int64_t tiles = (kept + granularity - 1) / granularity;
  const int32_t* ptr = lists.tile_ptr.data;
  STD_TORCH_CHECK(lists.tile_ptr.size == tiles + 1, "tile_ptr must have ", tiles + 1,
                  " entries for ", kept, " columns in tiles of ", granularity, ", got ",
                  lists.tile_ptr.size);
  STD_TORCH_CHECK(ptr[0] == 0, "tile_ptr must begin with 0, got ", ptr[0]);
  STD_TORCH_CHECK(ptr[tiles] == nnz, "tile_ptr must end with the length of index, ", nnz, ", got ",
                  ptr[tiles]);
  for (int64_t t = 0; t < tiles; ++t) {
    STD_TORCH_CHECK(ptr[t] <= ptr[t + 1], "tile_ptr must not decrease, got ", ptr[t], " before ",
                    ptr[t + 1], " at entry ", t + 1);
  }
  const Kernels& k = kernels();
  a->index = lists.index.data;
  a->columns = lists.columns.data;
  STD_TORCH_CHECK(k.all_below(a->index, nnz, in_features), "index must lie in [0, ", in_features,
                  "), the input features");
  STD_TORCH_CHECK(k.all_below(a->columns, kept, out_features), "columns must lie in [0, ",
                  out_features, "), the output features");
  STD_TORCH_CHECK(k.increasing(a->columns, kept), "columns must increase strictly");
  a->tile_ptr = ptr;
  a->tile_end = ptr + 1;
  a->kept = kept;
  a->granularity = granularity;
  a->tiles = tiles;
  a->n = out_features;
  a->k = in_features;
  int64_t values = 0;
  for (int64_t t = 0; t < tiles; ++t) values += int64_t{ptr[t + 1] - ptr[t]} * a->width(t);
  return values;
}

// Checks a tile-packed weight against the convolution in `a`, whose window is set, and completes
// that. Returns the number of packed weights.
template <class Conv>
int64_t check_conv(const TileLists& lists, int64_t granularity, int64_t out_features, Conv* a) {
  check_window(a);
  STD_TORCH_CHECK(a->groups >= 1 && a->channels % a->groups == 0 && out_features % a->groups == 0,
                  "groups must divide ", a->channels, " input and ", out_features,
                  " output channels, got ", a->groups);
  constexpr int64_t kMost = int64_t{1} << 24;
  const int64_t window = a->kernel_h * a->kernel_w, channels = a->group_channels();
  STD_TORCH_CHECK(window <= kMost && channels * window <= kMost, "a group of ", channels,
                  " channels under a window of ", window, " elements is too large");
  const int64_t values = check_tiles(lists, granularity, out_features, channels * window, a);
  a->m = a->out_h * a->out_w;
  for (int64_t t = 0; t < a->tiles && a->groups > 1; ++t) {
    const int64_t last = a->columns[a->first_column(t + 1) - 1];
    STD_TORCH_CHECK(a->group_of(t) == last / (a->n / a->groups),
                    "a tile must lie inside one group, got output features ",
                    a->columns[a->first_column(t)], " to ", last, " in tile ", t);
  }
  return values;
}

// Index lists that are tensors: made contiguous, and kept.
class TileTensors {
 public:
  TileTensors(const Tensor& index, const Tensor& tile_ptr, const Tensor& columns)
      : kept_{int_list(index, "index"), int_list(tile_ptr, "tile_ptr"),
              int_list(columns, "columns")} {}
  TileLists lists() const {
    return {span_of<int32_t>(kept_[0]), span_of<int32_t>(kept_[1]), span_of<int32_t>(kept_[2])};
  }

 private:
  static Tensor int_list(const Tensor& t, const char* name) {
    check_tensor(t, name, element_types().int32, "int32");
    STD_TORCH_CHECK(t.dim() == 1, name, " must have one dimension, got shape ", shape_of(t));
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  }

  Tensor kept_[3];
};

}  // namespace fxprune

namespace torch::stable::detail {

template <>
struct ToImpl<fxprune::Text> {
  static fxprune::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    size_t length = 0;
    const char* characters = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &characters));
    fxprune::Text text{std::string(characters, length)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

}  // namespace torch::stable::detail
