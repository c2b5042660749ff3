// Feature-major tile-wise GEMM in bfloat16, and how lines of pixels are stored.
//
// A block is 32 neighbouring pixels of every input feature. Where many tiles read it, or a gate
// multiplies it, it is copied into a panel first; else rows are gathered where they lie.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/tile_gemm_bf16.h"

namespace fxprune {

template <class V>
struct PixelsBf16 : TileBf16<V> {
  using M = TileBf16<V>;
  using M::kW;
  using typename M::Reg;

  // Features that have pixels in more than the first 16 lanes of a line of sums.
  static int64_t halves(int64_t lanes) { return lanes > V::kFirstHalf ? 2 : 1; }

  // Rows [0, rows) of sums into the planes of their features.
  static void store(const TileGemmBf16& a, int64_t image, const BlockLanes& lanes,
                    const int32_t* columns, int64_t rows, float* sums) {
    const bool smooth = !ends_in_registers(a.activation);
    const float* bias = a.bias;
    if (smooth || a.residual) {
      for (int64_t r = 0; r < rows; ++r) add(a, image, lanes, columns[r], sums + r * kPixels);
      if (smooth) activate<V>(a.activation, sums, rows * kPixels);
      bias = nullptr;
    }
    if (a.activation == Activation::kHardswish) {
      return store(a, image, lanes, columns, rows, sums, bias, Hardswish{});
    }
    store(a, image, lanes, columns, rows, sums, bias, Clamped(a.activation));
  }

  struct Hardswish {
    Reg operator()(Reg x) const { return hardswish<V>(x); }
  };
  struct Clamped {
    explicit Clamped(Activation activation) {
      const Clamp clamp = clamp_of(activation);
      low = V::set1(clamp.low), high = V::set1(clamp.high);
    }
    Reg operator()(Reg x) const { return V::min(high, V::max(low, x)); }
    Reg low, high;
  };

  // end(sums + bias), rounded. bias: of every feature, or null.
  template <class End>
  static void store(const TileGemmBf16& a, int64_t image, const BlockLanes& lanes,
                    const int32_t* columns, int64_t rows, const float* sums, const float* bias,
                    const End& end) {
    const int64_t pitch = a.ldo();
    Bf16* const plane = a.out + image * a.n * pitch;
    if (lanes.whole()) {
      Bf16* const line = plane + lanes.runs[0].shift;
      for (int64_t r = 0; r < rows; ++r, sums += kPixels) {
        const Reg shift = bias ? V::set1(bias[columns[r]]) : V::zero();
        V::store_line(line + columns[r] * pitch, V::line_of(sums, shift, end));
      }
      return;
    }
    for (int64_t r = 0; r < rows; ++r, sums += kPixels) {
      const Reg shift = bias ? V::set1(bias[columns[r]]) : V::zero();
      V::store_line(plane + columns[r] * pitch, lanes, V::line_of(sums, shift, end));
    }
  }

  // sums += bias + residual
  static void add(const TileGemmBf16& a, int64_t image, const BlockLanes& lanes, int64_t feature,
                  float* sums) {
    const Reg bias = a.bias ? V::set1(a.bias[feature]) : V::zero();
    if (!a.residual) {
      for (int64_t p = 0; p < kPixels; p += kW) V::store(sums + p, V::add(V::load(sums + p), bias));
      return;
    }
    const Bf16* from = a.residual + (image * a.n + feature) * a.ldr();
    V::add_line(
        lanes.whole() ? V::load_line(from + lanes.runs[0].shift) : V::load_line(from, lanes), bias,
        sums);
  }

  // Output features [from, to), of which `columns` were computed; `line`: 32 floats of scratch.
  static void store(const TileGemmBf16& a, int64_t image, const BlockLanes& lanes,
                    const int32_t* columns, int64_t features, int64_t from, int64_t to, float* sums,
                    float* line) {
    store(a, image, lanes, columns, features, sums);
    const bool smooth = !is_clamp(a.activation), plain = !smooth && !a.residual && lanes.whole();
    int64_t column = 0;
    for (int64_t f = from; f < to && to - from != features; ++f) {
      if (column < features && columns[column] == f) {
        ++column;
        continue;
      }
      if (plain) {
        store_bias(a, image, lanes.runs[0].shift, f);
        continue;
      }
      const int32_t gap = static_cast<int32_t>(f);
      std::fill_n(line, kPixels, 0.0f);
      store(a, image, lanes, &gap, 1, line);
    }
  }

  // A feature that is a bias alone, in a whole block.
  static void store_bias(const TileGemmBf16& a, int64_t image, int64_t shift, int64_t feature) {
    alignas(64) static constexpr float kNothing[kPixels] = {};
    const Reg bias = V::set1(a.bias ? a.bias[feature] : 0.0f);
    const auto line = V::line_of(kNothing, bias, Clamped(a.activation));
    V::store_line(a.out + (image * a.n + feature) * a.ldo() + shift, line);
  }
};

// Results of blocks of 32 pixels of one image.
template <class V>
struct PixelOutput {
  const TileGemmBf16& a;
  int64_t image;
  float* line;

  int64_t count(int64_t block) const { return std::min(kPixels, a.m - block * kPixels); }
  int64_t halves(int64_t block) const { return PixelsBf16<V>::halves(count(block)); }
  void hold(int64_t, int64_t) {}
  void ask(int64_t block, const int32_t* columns, int64_t features, int64_t) const {
    const Bf16* out = a.out + image * a.n * a.ldo() + block * kPixels;
    for (int64_t r = 0; r < features; ++r) __builtin_prefetch(out + columns[r] * a.ldo(), 1);
  }
  void store(int64_t block, const int32_t* columns, int64_t features, int64_t from, int64_t to,
             float* sums) const {
    BlockLanes lanes;
    lanes.add(block * kPixels, 0, count(block));
    PixelsBf16<V>::store(a, image, lanes, columns, features, from, to, sums, line);
  }
};

// Input features of one image where they lie.
template <class V>
struct PixelRows {
  const TileGemmBf16& a;
  const Bf16* x;

  void hold(int64_t, int64_t) {}
  void gather(int64_t, int64_t block, const int32_t* index, int64_t count, Bf16* pairs) const {
    const int64_t pitch = a.ldx();
    const Bf16* from = x + block * kPixels;
    const auto at = [=](int32_t k) { return from + k * pitch; };
    TileBf16<V>::gather(index, count, a.m - block * kPixels, at, pairs);
  }
};

// A span of blocks of 32 pixels of an image.
template <class V>
void tile_gemm_bf16_feature_major(const TileGemmBf16& a, const TileSpan& span, float* scratch) {
  using M = PixelsBf16<V>;
  const auto room = M::room(a, scratch);
  PixelOutput<V> output{a, span.image, room.square};
  const Bf16* x = a.x + span.image * a.k * a.ldx();
  const int64_t kept = a.tile_ptr[span.tile_end] - a.tile_ptr[span.tile_begin];
  // A panel is worth its copy once the tiles read each row of it twice, from pages that are many.
  constexpr int64_t kNear = 512;  // pixels
  if (!a.gate && (kept < 2 * a.k || a.ldx() <= kNear)) {
    PixelRows<V> source{a, x};
    return M::run(a, span, span.end - span.begin, room, source, output);
  }
  const Bf16* gate = a.gate ? a.gate + span.image * a.k : nullptr;
  const auto pack = [&](int64_t block, Bf16* panel) {
    const Bf16* from = x + block * kPixels;
    const int64_t count = output.count(block);
    for (int64_t k = 0; k < a.k; ++k, from += a.ldx(), panel += kPixels) {
      if (!gate) {
        V::copy_bf16(from, count, panel);
        continue;
      }
      const auto factor = V::set1(widen(gate[k]));
      for (int64_t p = 0; p < kPixels; p += V::kWidth) {
        const int64_t lanes = std::max<int64_t>(count - p, 0);
        V::store_bf16(panel + p, V::mul(factor, V::load_bf16(from + p, lanes)));
      }
    }
  };
  Panels<V, decltype(pack)> source{a, room.panels, pack};
  M::run(a, span, bf16_group(a), room, source, output);
}

}  // namespace fxprune
