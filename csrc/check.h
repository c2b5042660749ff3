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
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type));
  return type;
}

// Bytes of an element of a floating-point tensor, 0 of any other.
inline int64_t float_bytes(const Tensor& t) {
  static const int32_t half = aoti_torch_dtype_float16(), wide = aoti_torch_dtype_float64();
  const int32_t type = type_of(t);
  if (type == element_types().float32) return 4;
  if (type == element_types().bfloat16 || type == half) return 2;
  return type == wide ? 8 : 0;
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

// An uninitialised tensor of a type, by default that of `like`. Directly by the C interface:
// torch::stable::new_empty looks the operator up by name and boxes its arguments, which takes as
// long as a small kernel.
inline Tensor empty_output(const Tensor& like, const std::vector<int64_t>& shape, int32_t type) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), shape.data(),
                                                   static_cast<int64_t>(shape.size()), &type,
                                                   nullptr, nullptr, 0, nullptr, &handle));
  return Tensor(handle);
}

inline Tensor empty_output(const Tensor& like, const std::vector<int64_t>& shape) {
  return empty_output(like, shape, type_of(like));
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

}  // namespace fxprune

namespace torch::stable::detail {

template <>
struct ToImpl<fxprune::Text> {
  static fxprune::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    size_t length = 0;
    const char* characters = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &characters));
    fxprune::Text text{std::string(characters, length)};
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

}  // namespace torch::stable::detail
