// The kernel of fxprune::skip_zeros_mm: rows of x become lists of non-zeros, each of which adds a
// multiple of a row of w.
//
//   list[r]          = non-zeros of row r among kSkipPart channels     once for all of K
//   panel[c][kBlock] = those channels' rows of w, next to each other   once for all rows of a unit
//   out[r][kBlock]  += value * panel[channel]                          sums stay in registers
//
// Feature-major memory is transposed square by square on its way in and out. Every sum is taken in
// the order of the channels, however the work is cut. Include only under a target pragma.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>

#include "fxprune/skip_zeros.h"
#include "fxprune/unroll.h"

namespace fxprune {

template <class V>
struct SkipKernel {
  using Reg = typename V::Reg;
  static constexpr int kW = V::kWidth, kVecs = kSkipVecs;
  static constexpr int64_t kBlock = kVecs * kW;

  // Adds the multiples of a list to `vecs` vectors of a row of sums, the last of which has `tail`
  // lanes; a first part begins with zeros.
  struct List {
    const float* value;
    const int32_t* at;  // where the panel holds the channel's row
    int64_t count;
  };

  template <int Vecs>
  static void accumulate(const List& list, const float* panel, float* out, int64_t lanes,
                         bool first) {
    const auto tail = V::first(lanes);
    Reg sum[Vecs];
    FXPRUNE_UNROLL
    for (int v = 0; v < Vecs; ++v) {
      const bool whole = v + 1 < Vecs;
      sum[v] = first ? V::zero() : whole ? V::load(out + v * kW) : V::load(out + v * kW, tail);
    }
    const float* value = list.value;
    const int32_t* at = list.at;
    for (int64_t i = 0; i < list.count; ++i) {
      const float* w = panel + at[i];
      const Reg x = V::set1(value[i]);
      FXPRUNE_UNROLL
      for (int v = 0; v < Vecs; ++v) sum[v] = V::fma(x, V::load(w + v * kW), sum[v]);
    }
    FXPRUNE_UNROLL
    for (int v = 0; v + 1 < Vecs; ++v) V::store(out + v * kW, sum[v]);
    V::store(out + (Vecs - 1) * kW, tail, sum[Vecs - 1]);
  }

  using Kernel = void (*)(const List&, const float*, float*, int64_t, bool);

  template <int... I>
  static constexpr std::array<Kernel, kVecs> table(std::integer_sequence<int, I...>) {
    return {{&accumulate<I + 1>...}};
  }

  const SkipZeros& a;
  int64_t first_row, last_row;
  float *panel, *value, *square, *results;
  int32_t *at, *end;

  SkipKernel(const SkipZeros& a_in, int64_t first, int64_t last, float* scratch)
      : a(a_in), first_row(first), last_row(last) {
    const int64_t rows = last - first, part = std::min(kSkipPart, a.n),
                  lists = rows * part + 2 * kW;
    const auto take = [&scratch](int64_t floats) {  // whole cache lines
      float* taken = scratch;
      scratch += (floats + 15) / 16 * 16;
      return taken;
    };
    panel = take(part * kBlock);
    value = take(lists);
    at = reinterpret_cast<int32_t*>(take(lists));
    end = reinterpret_cast<int32_t*>(take(rows));
    square = take(kW * kW);
    results = a.row_major ? a.out + first * a.k : take((rows + kW) * pitch());
  }

  // Floats between two rows of results.
  int64_t pitch() const { return a.row_major ? a.k : (a.k + kW - 1) / kW * kW; }

  void run() const {
    static constexpr auto kKernels = table(std::make_integer_sequence<int, kVecs>());
    const int64_t rows = last_row - first_row;
    for (int64_t c = 0; c < a.n; c += kSkipPart) {
      const int64_t channels = std::min(kSkipPart, a.n - c);
      list(c, channels);
      for (int64_t k = 0; k < a.k; k += kBlock) {
        const int64_t width = std::min(kBlock, a.k - k), vecs = (width + kW - 1) / kW;
        const int64_t lanes = width - (vecs - 1) * kW;
        load_panel(a.w + c * a.k + k, a.k, channels, vecs, lanes);
        for (int64_t r = 0, begin = 0; r < rows; begin = end[r++]) {
          const List list = {value + begin, at + begin, end[r] - begin};
          kKernels[vecs - 1](list, panel, results + r * pitch() + k, lanes, c == 0);
        }
      }
    }
    if (!a.row_major) store_positions();
  }

  void load_panel(const float* w, int64_t pitch, int64_t channels, int64_t vecs,
                  int64_t lanes) const {
    const auto tail = V::first(lanes);
    for (int64_t c = 0; c < channels; ++c, w += pitch) {
      float* to = panel + c * kBlock;
      for (int64_t v = 0; v + 1 < vecs; ++v) V::store(to + v * kW, V::load(w + v * kW));
      V::store(to + (vecs - 1) * kW, V::load(w + (vecs - 1) * kW, tail));
    }
  }

  // Makes the lists of some channels.
  void list(int64_t channel, int64_t channels) const {
    a.row_major ? list_rows(channel, channels) : list_positions(channel, channels);
  }

  void list_rows(int64_t channel, int64_t channels) const {
    int64_t count = 0;
    for (int64_t r = first_row; r < last_row; ++r) {
      const float* x = a.x + r * a.n + channel;
      for (int64_t c = 0; c < channels; c += kW) {
        count += V::nonzeros(x + c, std::min<int64_t>(kW, channels - c), c * kBlock, kBlock,
                             value + count, at + count);
      }
      end[r - first_row] = static_cast<int32_t>(count);
    }
  }

  // Calls f(sample, position, count, row) for runs of up to kW positions of one sample.
  template <class F>
  void for_each_run(const F& f) const {
    for (int64_t row = first_row; row < last_row;) {
      const int64_t sample = row / a.positions, position = row % a.positions;
      const int64_t left = std::min(a.positions - position, last_row - row);
      const int64_t count = std::min<int64_t>(kW, left);
      f(sample, position, count, row - first_row);
      row += count;
    }
  }

  void list_positions(int64_t channel, int64_t channels) const {
    int64_t count = 0;
    for_each_run([&](int64_t sample, int64_t position, int64_t run, int64_t row) {
      const auto tail = V::first(run);
      alignas(64) float lines[kSkipPart * kW];  // [channels / kW][positions][kW]
      for (int64_t c = 0; c < channels; c += kW) {
        const float* x = a.x + (sample * a.n + channel + c) * a.positions + position;
        if (run == kW && c + kW <= channels) {
          V::transpose(x, a.positions, lines + c * kW, kW);
          continue;
        }
        for (int64_t i = 0; i < kW; ++i) {
          const bool there = c + i < channels;
          V::store(square + i * kW, there ? V::load(x + i * a.positions, tail) : V::zero());
        }
        V::transpose(square, kW, lines + c * kW, kW);
      }
      for (int64_t r = 0; r < run; ++r) {
        for (int64_t c = 0; c < channels; c += kW) {
          count +=
              V::nonzeros(lines + (c + r) * kW, kW, c * kBlock, kBlock, value + count, at + count);
        }
        end[row + r] = static_cast<int32_t>(count);
      }
    });
  }

  void store_positions() const {
    for_each_run([&](int64_t sample, int64_t position, int64_t run, int64_t row) {
      const auto tail = V::first(run);
      for (int64_t k = 0; k < a.k; k += kW) {
        const float* from = results + row * pitch() + k;
        float* out = a.out + (sample * a.k + k) * a.positions + position;
        const int64_t lines = std::min<int64_t>(kW, a.k - k);
        if (run == kW && lines == kW) {
          V::transpose(from, pitch(), out, a.positions);
          continue;
        }
        V::transpose(from, pitch(), square, kW);
        for (int64_t i = 0; i < lines; ++i) {
          V::store(out + i * a.positions, tail, V::load(square + i * kW));
        }
      }
    });
  }
};

// Rows [first, last) of all samples. scratch: skip_scratch() floats, aligned to cache lines.
template <class V>
void skip_zeros(const SkipZeros& a, int64_t first, int64_t last, float* scratch) {
  SkipKernel<V>(a, first, last, scratch).run();
}

}  // namespace fxprune
