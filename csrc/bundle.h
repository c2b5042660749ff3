// Many weights in one tensor per type. A call that names hundreds of tensors spends longer on
// naming them than a small layer takes.
//
// The layout holds per weight: elements * 8 + image * 4 + tensor, which is the tensor that it lies
// in, and whether it is an image of bfloat16 weights. In its tensor, each begins at the next
// multiple of 64 bytes. fxprune/ops/bundle.py writes both.
#pragma once

#include <cstddef>
#include <type_traits>
#include <vector>

#include "check.h"

namespace fxprune {

class Bundle {
 public:
  Bundle(const std::vector<Tensor>& weights, const std::vector<int64_t>& layout) {
    STD_TORCH_CHECK(weights.size() <= kMost, "weights must be at most ", kMost, " tensors, got ",
                    weights.size());
    std::vector<Room> rooms;
    for (const Tensor& t : weights) rooms.push_back(room(t));
    parts_.reserve(layout.size());
    for (const int64_t entry : layout) {
      const size_t number = entry & 3;
      const int64_t size = entry >> 3;
      STD_TORCH_CHECK(size >= 0 && number < rooms.size(), "layout holds ", entry,
                      ", which is no size and tensor of ", rooms.size());
      Room& r = rooms[number];
      STD_TORCH_CHECK(size <= r.left, "part ", parts_.size(), " of the layout goes beyond the ",
                      "end of its tensor");
      parts_.push_back({r.data, r.type, size, (entry & 4) != 0});
      const int64_t line = kLine / r.width,
                    step = std::min(r.left, (size + line - 1) / line * line);
      r.data += step * r.width, r.left -= step;
    }
  }

  bool is_bf16(int64_t id) const { return part(id).type == element_types().bfloat16; }
  bool is_image(int64_t id) const { return part(id).image; }

  template <class T>
  Span<T> get(int64_t id, const char* name) const {
    const Part& p = part(id);
    const ElementTypes& types = element_types();
    const auto [type, text] = std::is_same_v<T, float>     ? std::pair(types.float32, "float32")
                              : std::is_same_v<T, Bf16>    ? std::pair(types.bfloat16, "bfloat16")
                              : std::is_same_v<T, int32_t> ? std::pair(types.int32, "int32")
                                                           : std::pair(types.int64, "int64");
    STD_TORCH_CHECK(p.type == type, name, " must be ", text, ", weight ", id, " is not");
    return {reinterpret_cast<const T*>(p.data), p.size};
  }
  // A weight that must have `size` numbers.
  template <class T>
  Span<T> get(int64_t id, const char* name, int64_t size) const {
    const Span<T> found = get<T>(id, name);
    STD_TORCH_CHECK(found.size == size, name, " must hold ", size, " numbers, got ", found.size);
    return found;
  }

 private:
  struct Part {
    const std::byte* data;
    int32_t type;
    int64_t size;
    bool image;
  };
  // What is left of a tensor.
  struct Room {
    const std::byte* data;
    int32_t type;
    int64_t width, left;
  };
  static constexpr size_t kMost = 4;
  static constexpr int64_t kLine = 64;

  static Room room(const Tensor& t) {
    const ElementTypes& types = element_types();
    const int32_t type = type_of(t);
    const int64_t width = type == types.int64                            ? 8
                          : type == types.bfloat16                       ? 2
                          : type == types.float32 || type == types.int32 ? 4
                                                                         : 0;
    STD_TORCH_CHECK(width > 0, "weights must be float32, bfloat16, int32 and int64 tensors");
    STD_TORCH_CHECK(t.is_cpu(), "weights must be on the CPU");
    STD_TORCH_CHECK(t.dim() == 1 && t.is_contiguous(),
                    "weights must be contiguous with one dimension, got shape ", shape_of(t));
    return {static_cast<const std::byte*>(t.const_data_ptr()), type, width, t.numel()};
  }

  const Part& part(int64_t id) const {
    STD_TORCH_CHECK(id >= 0 && id < static_cast<int64_t>(parts_.size()), "weight ", id, " of ",
                    parts_.size(), " does not exist");
    return parts_[id];
  }

  std::vector<Part> parts_;
};

}  // namespace fxprune
