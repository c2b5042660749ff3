// Depthwise convolution over kept taps where masked loads are dear: a band of a plane is copied
// with its padding as zeros, and every tap is then a plain load.
//
// Strides of two along a row are undone by the copy, too: the even and the odd columns of the
// padded rows are planes of their own. The copy stays in L1.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "fxprune/depthwise_lists.h"
#include "fxprune/math.h"
#include "fxprune/unroll.h"

namespace fxprune {

template <class V>
class PaddedDepthwise {
  using Reg = typename V::Reg;
  static constexpr int64_t kW = V::kWidth;
  static constexpr int64_t kFloats = 4096, kMostTaps = 128;
  // Rows of a block by the vectors that a row of it has; narrow planes are cut in blocks of more
  // rows.
  static constexpr int kRows = 4, kMiddle = 5, kTall = 7, kVecs = V::kAccumulators / kRows;
  static constexpr int kFew = 9;            // taps whose weights fit the registers
  static constexpr int64_t kLeastRows = 4;  // of the result, that a copy is worth

 public:
  // False where too few rows fit the copy.
  static bool fits(const DepthwiseShape& a) {
    return a.vectorised() && a.kernel() <= kMostTaps &&
           rows_read_by(a, kLeastRows) * a.stride_w * pitch(a) <= kFloats;
  }

  // Computes output rows [begin, end) of `planes` planes.
  PaddedDepthwise(const DepthwiseShape& a, int64_t begin, int64_t end, int64_t planes)
      : a_(a), begin_(begin), end_(end), pitch_(pitch(a)), step_(end - begin), together_(planes) {
    if (rows_read_by(a, step_) * a.stride_w * pitch_ > kFloats) {
      const int64_t most = (kFloats / (a.stride_w * pitch_) - rows_read_by(a, 1)) / a.stride_h + 1,
                    parts = (step_ + most - 1) / most;
      step_ = (step_ + parts - 1) / parts;
      together_ = 1;
    }
    rows_ = rows_read_by(a, step_);
    const int64_t size = plane_size();
    if (together_ * size > kFloats) together_ = kFloats / size;
    std::fill_n(copy_, together_ * size, 0.0f);
    int32_t* offset = offsets_;
    for (int64_t dy = 0, down = 0; dy < a.kernel_h; ++dy, down += a.dilation_h * pitch_) {
      for (int64_t dx = 0, right = 0; dx < a.kernel_w; ++dx, right += a.dilation_w) {
        const int64_t phase = a.stride_w == 2 ? right % 2 : 0, column = right >> (a.stride_w - 1);
        *offset++ = static_cast<int32_t>(phase * rows_ * pitch_ + down + column);
      }
    }
  }

  // Planes that are copied before the first of them is computed: what was stored just now is slow
  // to read in other vectors.
  int64_t together() const { return together_; }

  // Planes of channels [channel, channel + count), count <= together(); x and out are of the first.
  void run(const float* x, int64_t x_pitch, int64_t channel, int64_t count, float* out,
           int64_t out_pitch) {
    for (int64_t first = begin_; first < end_; first += step_) {
      const int64_t rows = std::min(step_, end_ - first);
      for (int64_t i = 0; i < count; ++i)
        fill(x + i * x_pitch, first, rows, copy_ + i * plane_size());
      for (int64_t i = 0; i < count; ++i)
        compute(copy_ + i * plane_size(), channel + i, rows,
                out + i * out_pitch + first * a_.out_w);
    }
  }

 private:
  static int64_t round_up(int64_t n) { return (n + kW - 1) / kW * kW; }
  // Floats from row to row: what the last vector of a row reads, and what the copy writes.
  static int64_t pitch(const DepthwiseShape& a) {
    const int64_t half = a.stride_w - 1;  // a shift
    const int64_t read = round_up(a.out_w) + ((a.kernel_w - 1) * a.dilation_w >> half),
                  written = ((a.pad_w + half) >> half) + round_up((a.width + half) >> half);
    return std::max(read, written);
  }
  // Rows of the image, padding included, behind `rows` of the result.
  static int64_t rows_read_by(const DepthwiseShape& a, int64_t rows) {
    return (rows - 1) * a.stride_h + (a.kernel_h - 1) * a.dilation_h + 1;
  }
  int64_t plane_size() const { return a_.stride_w * rows_ * pitch_; }

  // Copies what `count` output rows from `first` on read. Columns of padding, and rows where all
  // output rows are computed at once, are zero from the beginning.
  void fill(const float* x, int64_t first, int64_t count, float* copy) const {
    const int64_t top = first * a_.stride_h - a_.pad_h, rows = rows_read_by(a_, count);
    const int64_t from = std::clamp<int64_t>(-top, 0, rows),
                  to = std::clamp<int64_t>(a_.height - top, from, rows);
    // Vectors reach beyond a row's end; beyond that of the plane there may be nothing.
    const int64_t vector = a_.stride_w * kW, reach = (a_.width + vector - 1) / vector * vector;
    int64_t safe = to;
    while (safe > from && (top + safe - 1) * a_.width + reach > a_.height * a_.width) --safe;
    if (a_.stride_w == 1) {
      fill_whole<false>(x, top, from, safe, copy);
      fill_whole<true>(x, top, safe, to, copy);
    } else {
      fill_halves<false>(x, top, from, safe, copy);
      fill_halves<true>(x, top, safe, to, copy);
    }
    if (step_ == end_ - begin_) return;
    clear(copy, 0, from);
    clear(copy, to, rows);
  }
  void clear(float* copy, int64_t from, int64_t to) const {
    for (int64_t s = 0; s < a_.stride_w && from < to; ++s)
      std::fill_n(copy + (s * rows_ + from) * pitch_, (to - from) * pitch_, 0.0f);
  }
  // Rows [from, to) of the copy, whose row 0 is row `top` of x. Exact: reads no lane that it drops.
  template <bool Exact>
  static Reg part(const float* p, typename V::Mask lanes) {
    return Exact ? V::load(p, lanes) : V::keep(V::load(p), lanes);
  }
  template <bool Exact>
  void fill_whole(const float* x, int64_t top, int64_t from, int64_t to, float* copy) const {
    const int64_t width = a_.width, whole = (width - 1) / kW * kW, pitch = pitch_;
    const auto tail = V::first(width - whole);
    float* row = copy + from * pitch + a_.pad_w;
    x += (top + from) * width;
    if (whole == kW) {
      for (int64_t i = from; i < to; ++i, x += width, row += pitch) {
        V::store(row, V::load(x));
        V::store(row + kW, part<Exact>(x + kW, tail));
      }
      return;
    }
    for (int64_t i = from; i < to; ++i, x += width, row += pitch) {
      for (int64_t c = 0; c < whole; c += kW) V::store(row + c, V::load_opaque(x + c));
      V::store(row + whole, part<Exact>(x + whole, tail));
    }
  }
  template <bool Exact>
  void fill_halves(const float* x, int64_t top, int64_t from, int64_t to, float* copy) const {
    const int64_t width = a_.width, whole = (width - 1) / (2 * kW) * 2 * kW, pitch = pitch_;
    const auto low = V::first(width - whole), high = V::first(width - whole - kW);
    const int64_t odd_pad = a_.pad_w % 2, half = rows_ * pitch;
    float *even = copy + from * pitch + odd_pad * half + a_.pad_w / 2,
          *odd = copy + from * pitch + (1 - odd_pad) * half + (a_.pad_w + 1) / 2;
    const auto put = [&](int64_t c, Reg first, Reg second) {
      V::store(even + c / 2, V::evens(first, second));
      V::store(odd + c / 2, V::odds(first, second));
    };
    x += (top + from) * width;
    for (int64_t i = from; i < to; ++i, x += width, even += pitch, odd += pitch) {
      for (int64_t c = 0; c < whole; c += 2 * kW) put(c, V::load(x + c), V::load(x + c + kW));
      put(whole, part<Exact>(x + whole, low), part<Exact>(x + whole + kW, high));
    }
  }

  // `rows` rows of the result from the copy.
  void compute(const float* copy, int64_t channel, int64_t rows, float* out) const {
    const float* weights = a_.weight + channel * a_.kernel();
    FewTaps taps;
    taps.bias = V::set1(a_.bias ? a_.bias[channel] : 0.0f);
    int64_t count = 0;
    for (KeptTaps tap(a_, channel); tap; ++tap, ++count) {
      if (count == kFew) return many(copy, channel, rows, out);
      taps.weight[count] = V::set1(weights[*tap]);
      taps.offset[count] = offsets_[*tap];
    }
    using Taps = std::make_integer_sequence<int, kFew + 1>;
    static constexpr std::array<std::array<Few, kFew + 1>, 3> kKernels = {
        {table<0>(Taps()), table<1>(Taps()), table<2>(Taps())}};
    const int64_t vecs = (a_.out_w + kW - 1) / kW;
    (this->*kKernels[vecs <= 2 ? vecs : 0][count])(copy, taps, rows, out);
  }

  struct FewTaps {
    Reg weight[kFew], bias;
    int64_t offset[kFew];
  };
  using Few = void (PaddedDepthwise::*)(const float*, const FewTaps&, int64_t, float*) const;
  template <int Vecs, int... I>
  static constexpr std::array<Few, sizeof...(I)> table(std::integer_sequence<int, I...>) {
    return {{&PaddedDepthwise::few<I, Vecs>...}};
  }

  // Few taps: all weights and places are in registers, and vectors follow each other row by row. A
  // row's last vector writes beyond it, which the rows behind make good. Vecs: of a row, 0 for any.
  template <int Taps, int Vecs>
  void few(const float* copy, const FewTaps& taps, int64_t rows, float* out) const {
    Reg weight[Taps + 1];
    int64_t offset[Taps + 1];
    const Reg bias = taps.bias;
    FXPRUNE_UNROLL
    for (int t = 0; t < Taps; ++t) weight[t] = taps.weight[t], offset[t] = taps.offset[t];
    const int64_t width = a_.out_w, last = (width - 1) / kW * kW, pitch = a_.stride_h * pitch_;
    int64_t exact = 0;  // rows at the end beyond which there would be too little room
    while (exact < rows && exact * width < last + kW - width) ++exact;
    const auto each = [&](const auto& end) {
      const auto at = [&](const float* from) {
        Reg sum = bias;
        FXPRUNE_UNROLL
        for (int t = 0; t < Taps; ++t) sum = V::fma(weight[t], V::load(from + offset[t]), sum);
        return end(sum);
      };
      int64_t r = 0;
      for (; r < rows - exact; ++r, copy += pitch, out += width) {
        if constexpr (Vecs == 0) {
          for (int64_t c = 0; c <= last; c += kW) V::store(out + c, at(copy + c));
        } else {
          FXPRUNE_UNROLL
          for (int v = 0; v < Vecs; ++v) V::store(out + v * kW, at(copy + v * kW));
        }
      }
      for (; r < rows; ++r, copy += pitch, out += width) {
        for (int64_t c = 0; c < last; c += kW) V::store(out + c, at(copy + c));
        V::store(out + last, V::first(width - last), at(copy + last));
      }
    };
    if (a_.activation == Activation::kHardswish)
      return each([](auto y) { return hardswish<V>(y); });
    const Clamp clamp = clamp_of(a_.activation);
    const Reg low = V::set1(clamp.low), high = V::set1(clamp.high);
    each([low, high](auto y) { return V::min(high, V::max(low, y)); });
  }

  // Any number of taps, block by block.
  void many(const float* copy, int64_t channel, int64_t rows, float* out) const {
    const int64_t vecs = (a_.out_w + kW - 1) / kW;
    const int64_t most = vecs == 1   ? kTall
                         : vecs == 2 ? kMiddle
                                     : kRows,
                  step = rows >= most ? most : 1, blocks = (vecs + kVecs - 1) / kVecs;
    for (int64_t start = 0; start < rows; start += step) {
      // The last block of rows is moved up to be whole, as in depthwise_planes.h.
      const int64_t row = std::min(start, rows - step);
      int64_t first = 0;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t here = vecs / blocks + (b < vecs % blocks);
        const float* from = copy + row * a_.stride_h * pitch_ + first * kW;
        float* to = out + row * a_.out_w + first * kW;
        const int64_t tail = a_.out_w - (first + here - 1) * kW;
        if (step == kTall) {
          block<kTall, 1>(channel, from, to, tail);
        } else if (step == kMiddle) {
          block<kMiddle, 2>(channel, from, to, tail);
        } else if (step == kRows) {
          of_vecs<kRows>(here, channel, from, to, tail);
        } else {
          of_vecs<1>(here, channel, from, to, tail);
        }
        first += here;
      }
    }
  }

  template <int Rows>
  void of_vecs(int64_t vecs, int64_t channel, const float* from, float* to, int64_t tail) const {
    static_assert(kVecs <= 3, "one branch for each number of vectors");
    if (vecs == 1) return block<Rows, 1>(channel, from, to, tail);
    if (vecs == 2) return block<Rows, 2>(channel, from, to, tail);
    block<Rows, kVecs>(channel, from, to, tail);
  }

  // tail: pixels of the last vector.
  template <int Rows, int Vecs>
  void block(int64_t channel, const float* from, float* to, int64_t tail) const {
    const float* weights = a_.weight + channel * a_.kernel();
    const Reg bias = V::set1(a_.bias ? a_.bias[channel] : 0.0f);
    const int64_t pitch = a_.stride_h * pitch_, ldo = a_.out_w;
    Reg acc[Rows][Vecs];
    FXPRUNE_UNROLL
    for (int r = 0; r < Rows; ++r) {
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v) acc[r][v] = bias;
    }
    for (KeptTaps tap(a_, channel); tap; ++tap) {
      const Reg weight = V::set1(weights[*tap]);
      const float* x = from + offsets_[*tap];
      FXPRUNE_UNROLL
      for (int r = 0; r < Rows; ++r, x += pitch) {
        FXPRUNE_UNROLL
        for (int v = 0; v < Vecs; ++v) acc[r][v] = V::fma(weight, V::load(x + v * kW), acc[r][v]);
      }
    }
    end_sums<V>(a_.activation, acc);
    const auto last = V::first(tail);
    FXPRUNE_UNROLL
    for (int r = 0; r < Rows; ++r, to += ldo) {
      FXPRUNE_UNROLL
      for (int v = 0; v + 1 < Vecs; ++v) V::store(to + v * kW, acc[r][v]);
      V::store(to + (Vecs - 1) * kW, last, acc[r][Vecs - 1]);
    }
  }

  const DepthwiseShape& a_;
  // step_: output rows of a copy; rows_: rows of one.
  int64_t begin_, end_, pitch_, step_, together_, rows_;
  int32_t offsets_[kMostTaps];
  alignas(64) float copy_[kFloats];
};

}  // namespace fxprune
