// Many weights in one tensor per type. A call that names hundreds of tensors spends longer on
// naming them than a small layer takes.
//
// The layout holds per weight: elements * 8 + image * 4 + tensor, which is the tensor that it lies
// in, and whether it is an image of bfloat16 weights. In its tensor, each begins at the next
// multiple of 64 bytes. fxprune/ops/bundle.py writes both.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"

namespace fxprune {

// Where weights lie, whatever they hold.
class BundleLayout {
 public:
  // types: of the tensors.
  BundleLayout(const std::vector<int64_t>& layout, const std::vector<int32_t>& types) {
    STD_TORCH_CHECK(types.size() <= kMost, "weights must be at most ", kMost, " tensors, got ",
                    types.size());
    std::vector<int64_t> widths;
    for (const int32_t type : types) widths.push_back(width_of(type));
    std::vector<int64_t> next(types.size());  // numbers
    needed_.resize(types.size());
    parts_.reserve(layout.size());
    for (const int64_t entry : layout) {
      const size_t number = entry & 3;
      const int64_t size = entry >> 3;
      STD_TORCH_CHECK(size >= 0 && size <= kMostNumbers && number < types.size(), "layout holds ",
                      entry, ", which is no size and tensor of ", types.size());
      parts_.push_back(
          {number, types[number], next[number] * widths[number], size, (entry & 4) != 0});
      needed_[number] = next[number] + size;
      STD_TORCH_CHECK(needed_[number] <= kMostNumbers, "the weights of a layout are too large");
      const int64_t line = kLine / widths[number];
      next[number] = (needed_[number] + line - 1) / line * line;
    }
  }

  // Numbers of a weight of type T.
  template <class T>
  int64_t size(int64_t id, const char* name) const {
    const Part& p = part(id);
    const ElementTypes& types = element_types();
    const auto [type, text] = std::is_same_v<T, float>     ? std::pair(types.float32, "float32")
                              : std::is_same_v<T, Bf16>    ? std::pair(types.bfloat16, "bfloat16")
                              : std::is_same_v<T, int32_t> ? std::pair(types.int32, "int32")
                                                           : std::pair(types.int64, "int64");
    STD_TORCH_CHECK(p.type == type, name, " must be ", text, ", weight ", id, " is not");
    return p.size;
  }
  bool is_bf16(int64_t id) const { return part(id).type == element_types().bfloat16; }
  bool is_image(int64_t id) const { return part(id).image; }

 private:
  friend class Bundle;
  struct Part {
    size_t tensor;
    int32_t type;
    int64_t offset;  // bytes
    int64_t size;
    bool image;
  };
  static constexpr size_t kMost = 4;
  static constexpr int64_t kLine = 64, kMostNumbers = int64_t{1} << 40;

  static int64_t width_of(int32_t type) {
    const ElementTypes& types = element_types();
    if (type == types.int64) return 8;
    if (type == types.float32 || type == types.int32) return 4;
    STD_TORCH_CHECK(type == types.bfloat16,
                    "weights must be float32, bfloat16, int32 and int64 tensors");
    return 2;
  }

  const Part& part(int64_t id) const {
    STD_TORCH_CHECK(id >= 0 && id < static_cast<int64_t>(parts_.size()), "weight ", id, " of ",
                    parts_.size(), " does not exist");
    return parts_[id];
  }

  std::vector<Part> parts_;
  std::vector<int64_t> needed_;  // numbers of each tensor
};

// The weights of a call. Types of tensors and of weights are those of the layout.
class Bundle {
 public:
  Bundle(const BundleLayout& layout, const std::vector<Tensor>& weights) : layout_(layout) {
    for (size_t i = 0; i < weights.size(); ++i) {
      const Tensor& t = weights[i];
      STD_TORCH_CHECK(t.is_cpu(), "weights must be on the CPU");
      STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous(),
                      "weights must be contiguous with one dimension, got shape ", shape_of(t));
      STD_TORCH_CHECK(t.numel() >= layout.needed_[i], "the layout goes beyond the end of weights[",
                      i, "], which must hold ", layout.needed_[i], " numbers, got ", t.numel());
      data_.push_back(static_cast<const std::byte*>(t.const_data_ptr()));
    }
  }

  const BundleLayout& layout() const { return layout_; }
  template <class T>
  Span<T> get(int64_t id) const {
    const BundleLayout::Part& p = layout_.part(id);
    return {reinterpret_cast<const T*>(data_[p.tensor] + p.offset), p.size};
  }

 private:
  const BundleLayout& layout_;
  std::vector<const std::byte*> data_;
};

}  // namespace fxprune
