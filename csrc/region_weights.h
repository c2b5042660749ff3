// The weights of one call of a region, attached to its steps. Contents are checked by whoever is
// about to run a step: the lists are then in that core's caches, where its kernels read them.
#pragma once

#include <cstdint>
#include <deque>
#include <type_traits>
#include <vector>

#include "region_program.h"

namespace fxprune {

template <class T>
class RegionWeights {
 public:
  using Step = StepOf<T>;
  static constexpr bool kBf16 = std::is_same_v<T, Bf16>;

  RegionWeights(const RegionProgram<T>& program, const Bundle& bundle)
      : program_(program), bundle_(bundle), held_(program.steps().size()) {
    for (size_t s = 0; s < held_.size(); ++s) hold(program.steps()[s], &held_[s]);
  }
  RegionWeights(const RegionWeights&) = delete;
  RegionWeights& operator=(const RegionWeights&) = delete;

  // Checks what step `s` reads.
  void check(size_t s) const {
    const Step& step = program_.steps()[s];
    if (step.code == Step::kDepthwise) {
      DepthwiseShape a = step.depthwise;
      check_tap_masks(held_[s].taps, &a);
    } else if (step.code == Step::kGemm) {
      check_values(step, check_gemm(step, held_[s].lists));
    } else if (step.code == Step::kConv) {
      check_values(step, check_conv(step, held_[s].lists));
    }
  }

  void attach(const Step& step, TileGemmOf<T>* a) const {
    const Held& held = of(step);
    a->values = held.values, a->bias = held.bias;
    a->index = held.lists.index.data, a->columns = held.lists.columns.data;
    a->tile_ptr = held.lists.tile_ptr.data, a->tile_end = a->tile_ptr + 1;
  }
  void attach(const Step& step, DepthwiseTapsOf<T>* a) const {
    const Held& held = of(step);
    a->weight = held.weight, a->bias = held.bias;
    a->taps = reinterpret_cast<const uint64_t*>(held.taps);
  }
  void attach(const Step& step, ChannelNormOf<T>* a) const {
    const Held& held = of(step);
    a->weight = held.weight, a->bias = held.bias;
  }

 private:
  struct Held {
    const T* values = nullptr;  // of a tile-packed weight; an image of them in bfloat16
    const float *weight = nullptr, *bias = nullptr;
    const int64_t* taps = nullptr;
    TileLists lists{};
  };
  // A tile-packed weight that was checked, and its number of values.
  struct Checked {
    TileShape shape;
    int64_t count;
  };

  void hold(const Step& step, Held* held) {
    held->bias = floats(step.bias);
    if (step.index < 0) {
      held->weight = floats(step.values);
      if (step.taps >= 0) held->taps = bundle_.get<int64_t>(step.taps).data;
      return;
    }
    held->lists = {bundle_.get<int32_t>(step.index), bundle_.get<int32_t>(step.tile_ptr),
                   bundle_.get<int32_t>(step.columns)};
    held->values = bundle_.get<T>(step.values).data;
    if constexpr (kBf16) {
      if (bundle_.layout().is_image(step.values)) return;
      const Checked checked =
          step.code == Step::kGemm ? check_gemm(step, held->lists) : check_conv(step, held->lists);
      check_values(step, checked);
      held->values =
          images_.emplace_back(bundle_.get<Bf16>(step.values), false, checked.count, checked.shape)
              .data();
    }
  }

  const float* floats(int64_t id) {
    if (id < 0) return nullptr;
    if (kBf16 && bundle_.layout().is_bf16(id))
      return wide_.emplace_back(bundle_.get<Bf16>(id)).data();
    return bundle_.get<float>(id).data;
  }

  static Checked check_gemm(const Step& step, const TileLists& lists) {
    TileGemmOf<T> a = step.gemm;
    const int64_t count = check_tile_lists(lists, &a);
    return {a, count};
  }
  static Checked check_conv(const Step& step, const TileLists& lists) {
    TileConvOf<T> a = step.conv;
    const int64_t count = check_conv_lists(lists, &a);
    return {a, count};
  }
  void check_values(const Step& step, const Checked& checked) const {
    const bool image = kBf16 && bundle_.layout().is_image(step.values);
    const int64_t found = bundle_.get<T>(step.values).size,
                  expected =
                      image ? image_offset(checked.shape, checked.shape.tiles) : checked.count;
    STD_TORCH_CHECK(found == expected, "values must hold ", expected, " numbers, got ", found);
  }

  const Held& of(const Step& step) const { return held_[&step - program_.steps().data()]; }

  const RegionProgram<T>& program_;
  const Bundle& bundle_;
  std::vector<Held> held_;
  std::deque<TileImage> images_;
  std::deque<Widened> wide_;
};

}  // namespace fxprune
