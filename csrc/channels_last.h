// Tensors whose channels, axis 1, are last in memory.
#pragma once

#include <vector>

#include "check.h"

namespace fxprune {

// True when `t` lies in memory as (sample, positions..., channels), the axis of channels being 1.
inline bool is_channels_last(const Tensor& t) {
  if (t.dim() < 3) return false;
  int64_t expected = 1;
  const auto dense = [&](int64_t axis) {
    const bool same = t.size(axis) == 1 || t.stride(axis) == expected;
    expected *= t.size(axis);
    return same;
  };
  bool all = dense(1);
  for (int64_t axis = t.dim() - 1; axis >= 2; --axis) all = dense(axis) && all;
  return dense(0) && all;
}

// An uninitialised tensor of the type and device of `like`.
inline Tensor empty_strided(const Tensor& like, const std::vector<int64_t>& sizes,
                            const std::vector<int64_t>& strides) {
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  const int32_t index = like.is_cpu() ? 0 : like.get_device_index();
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), type_of(like), device_type, index,
                                                  &handle));
  return Tensor(handle);
}

// The same, of the sizes and strides of a dense `like`.
inline Tensor empty_same(const Tensor& like) {
  std::vector<int64_t> sizes, strides;
  for (int64_t i = 0; i < like.dim(); ++i) {
    sizes.push_back(like.size(i));
    strides.push_back(like.stride(i));
  }
  return empty_strided(like, sizes, strides);
}

// The same, of `sizes` and with channels last in memory.
inline Tensor empty_channels_last(const Tensor& like, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  strides[1] = 1;
  int64_t step = sizes[1];
  for (size_t axis = sizes.size() - 1; axis >= 2; --axis) {
    strides[axis] = step;
    step *= sizes[axis];
  }
  strides[0] = step;
  return empty_strided(like, sizes, strides);
}

}  // namespace fxprune
