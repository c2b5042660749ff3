// The kernel of fxprune::nm_prune, one position per lane. Feature-major memory is read as it lies;
// of row-major memory a vector's worth of positions is transposed, pruned and transposed back.
// Include only under a target pragma.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/lanes.h"
#include "fxprune/nm_prune.h"
#include "fxprune/nm_prune_halves.h"
#include "fxprune/nm_select.h"

namespace fxprune {

template <class V, class E>
struct NmKernel {
  static constexpr int kWidth = V::kWidth;
  using L = Lanes<kWidth>;
  using Float = typename L::Float;
  using Int = typename L::Int;
  using Word = typename L::Word;
  using Storage = typename E::Storage;

  const NmPrune& a;

  // With kRandom, kMagnitude and kRescaled a vector holds the elements' own bits, which are
  // selected and never changed; with the others their values in float.
  bool raw() const { return a.function <= NmFunction::kRescaled; }

  static Word load(const Storage* p, int64_t count) {
    if (count >= kWidth) return E::template load<L>(p);
    Storage part[kWidth] = {};
    for (int64_t i = 0; i < count; ++i) part[i] = p[i];
    return E::template load<L>(part);
  }

  static void store(Storage* p, int64_t count, Word bits) {
    if (count >= kWidth) return E::template store<L>(p, bits);
    Storage part[kWidth];
    E::template store<L>(part, bits);
    for (int64_t i = 0; i < count; ++i) p[i] = part[i];
  }

  Float read(const Storage* p, int64_t count) const {
    const Word bits = load(p, count);
    return raw() ? reinterpret_cast<Float>(bits) : E::template value<L>(bits);
  }

  void write(Storage* p, int64_t count, Float v) const {
    store(p, count, raw() ? reinterpret_cast<Word>(v) : E::template bits<L>(v));
  }

  // The magnitude of what read() returns with kRescaled.
  static Float absolute(Float v) {
    return E::template value<L>(reinterpret_cast<Word>(v) & 0x7fffffffu);
  }

  // What is left of a magnitude sum after pruning, as the factor that restores it; 1 where that is
  // no number.
  static Float ratio(Float before, Float after) {
    const Float r = before / after;
    const Int finite = (reinterpret_cast<Int>(r) & 0x7f800000) != 0x7f800000;
    return L::choose(finite & (after > 0.0f), r, Float{} + 1.0f);
  }

  // Prunes x[0..m) of one group in place. position: of lane 0, counted over all samples.
  template <int M>
  void group(Float* x, int m_in, int n, int64_t position, int64_t channel) const {
    const int m = M ? M : m_in;
    Int key[M ? M : kMostOfGroup], keep[M ? M : kMostOfGroup], special{};
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) {
      key[i] = reinterpret_cast<Int>(x[i]) & 0x7fffffff;  // orders as |x| does, NaN above Inf
    }
    const int32_t infinite = raw() ? E::kInfinite : Float32::kInfinite;
    if (a.function == NmFunction::kRandom || a.function == NmFunction::kMvue) {
      for (int i = 0; i < m; ++i) special |= key[i] >= infinite;
    }
    if (a.function == NmFunction::kRandom) {
      for (int i = 0; i < m; ++i) {
        const Int not_finite = key[i] >= infinite;
        const Int drawn = reinterpret_cast<Int>(draw<L>(a, position, channel + i) >> 1);
        key[i] = (not_finite & 0x7fffffff) | (~not_finite & drawn);
      }
    }
    if (a.function == NmFunction::kMvue) {
      Float total{};
      for (int i = 0; i < m; ++i) total += reinterpret_cast<Float>(key[i]);
      const Int plain = special | (reinterpret_cast<Int>(total) >= 0x7f800000);
      if (any<L>(plain)) {
        keep_largest<L, M>(key, m, n, keep);
        for (int i = 0; i < m; ++i) {
          x[i] = reinterpret_cast<Float>(reinterpret_cast<Int>(x[i]) & (keep[i] | ~plain));
        }
      }
      return sample_unbiased<L, M>(x, m, n, draw<L>(a, position, channel), plain);
    }
    keep_largest<L, M>(key, m, n, keep);
    Float before{}, after{};
    if (a.function == NmFunction::kGroupRescaled) {
      for (int i = 0; i < m; ++i) {
        before += reinterpret_cast<Float>(key[i]);
        after += reinterpret_cast<Float>(key[i] & keep[i]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < m; ++i) {
      x[i] = reinterpret_cast<Float>(reinterpret_cast<Int>(x[i]) & keep[i]);
    }
    if (a.function == NmFunction::kGroupRescaled) {
      const Float factor = ratio(before, after);
      for (int i = 0; i < m; ++i) x[i] *= factor;
    }
  }

  // The factor of one channel from its lanes' sums of magnitudes before and after.
  static float channel_ratio(const Float& before, const Float& after) {
    Float sums[2] = {};
    for (int i = 0; i < kWidth; ++i) {
      sums[0][0] += before[i];
      sums[1][0] += after[i];
    }
    return ratio(sums[0], sums[1])[0];
  }

  // out[i] *= factor, rounded once.
  static void scale(Storage* out, int64_t count, float factor) {
    for (int64_t i = 0; i < count; i += kWidth) {
      const Float v = E::template value<L>(load(out + i, count - i));
      store(out + i, count - i, E::template bits<L>(v * factor));
    }
  }

  template <int M>
  void feature_major(const NmSpan& s) const {
    const bool rescale = a.function == NmFunction::kRescaled;
    for (int64_t g = s.first_group; g < s.last_group; ++g) {
      const int64_t channel = a.first_channel(g);
      const int m = static_cast<int>(M ? M : a.group_size(g));
      const int n = static_cast<int>(a.kept_of(m));
      const int64_t plane = (s.sample * a.channels + channel) * a.positions;
      const Storage* from = static_cast<const Storage*>(a.x) + plane;
      Storage* to = static_cast<Storage*>(a.out) + plane;
      Float before[M ? M : kMostOfGroup] = {}, after[M ? M : kMostOfGroup] = {};
      const auto prune = [&](int64_t p, int64_t count) {
        Float x[M ? M : kMostOfGroup];
        for (int i = 0; i < m; ++i) {
          x[i] = read(from + i * a.positions + p, count);
          if (rescale) before[i] += absolute(x[i]);
        }
        group<M>(x, m, n, s.sample * a.positions + p, channel);
        for (int i = 0; i < m; ++i) {
          if (rescale) after[i] += absolute(x[i]);
          write(to + i * a.positions + p, count, x[i]);
        }
      };
      int64_t p = s.first_position;
      for (; p + kWidth <= s.last_position; p += kWidth) prune(p, kWidth);
      if (p < s.last_position) {
        // The last vector starts early, unless that would add to sums twice.
        const bool early = !rescale && s.last_position - s.first_position >= kWidth;
        early ? prune(s.last_position - kWidth, kWidth) : prune(p, s.last_position - p);
      }
      for (int i = 0; rescale && i < m; ++i) {
        scale(to + i * a.positions, a.positions, channel_ratio(before[i], after[i]));
      }
    }
  }

  // A square of up to kWidth positions (rows, `channels` apart in memory) by kWidth channels.
  void load_square(const Storage* from, int64_t rows, int64_t columns, float* to) const {
    alignas(64) float square[kWidth * kWidth] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const Float v = read(from + r * a.channels, columns);
      std::memcpy(square + r * kWidth, &v, sizeof v);
    }
    V::transpose(square, kWidth, to, kWidth);
  }

  void store_square(const float* from, int64_t rows, int64_t columns, Storage* to) const {
    alignas(64) float square[kWidth * kWidth];
    V::transpose(from, kWidth, square, kWidth);
    for (int64_t r = 0; r < rows; ++r) {
      write(to + r * a.channels, columns, L::template read<Float>(square + r * kWidth));
    }
  }

  void row_major(const NmSpan& s, float* scratch) const {
    const bool rescale = a.function == NmFunction::kRescaled;
    const int64_t c0 = a.first_channel(s.first_group);
    const int64_t channels = a.first_channel(s.last_group) - c0;
    float* lanes = scratch;  // [channels, a whole number of vectors][kWidth]
    float* sums = lanes + (channels + kWidth) * kWidth;  // [channels][before, after][kWidth]
    if (rescale) std::fill(sums, sums + channels * 2 * kWidth, 0.0f);
    for (int64_t p = s.first_position; p < s.last_position; p += kWidth) {
      const int64_t rows = std::min<int64_t>(kWidth, s.last_position - p);
      const int64_t at = (s.sample * a.positions + p) * a.channels + c0;
      const Storage* from = static_cast<const Storage*>(a.x) + at;
      Storage* to = static_cast<Storage*>(a.out) + at;
      for (int64_t c = 0; c < channels; c += kWidth) {
        load_square(from + c, rows, channels - c, lanes + c * kWidth);
      }
      if (rescale) add_magnitudes(lanes, channels, sums);
      for (int64_t g = s.first_group; g < s.last_group; ++g) {
        float* first = lanes + (a.first_channel(g) - c0) * kWidth;
        const int m = static_cast<int>(a.group_size(g)), n = static_cast<int>(a.kept_of(m));
        const int64_t position = s.sample * a.positions + p;
        if (m == 4) {
          prune_lanes<4>(first, m, n, position, a.first_channel(g));
        } else if (m == 8) {
          prune_lanes<8>(first, m, n, position, a.first_channel(g));
        } else {
          prune_lanes<0>(first, m, n, position, a.first_channel(g));
        }
      }
      if (rescale) add_magnitudes(lanes, channels, sums + kWidth);
      for (int64_t c = 0; c < channels; c += kWidth) {
        store_square(lanes + c * kWidth, rows, channels - c, to + c);
      }
    }
    for (int64_t c = 0; rescale && c < channels; ++c) {  // takes the place of sums that were read
      sums[c] = channel_ratio(L::template read<Float>(sums + 2 * c * kWidth),
                              L::template read<Float>(sums + (2 * c + 1) * kWidth));
    }
    if (rescale) scale_channels(s, c0, channels, sums);
  }

  template <int M>
  void prune_lanes(float* lanes, int m, int n, int64_t position, int64_t channel) const {
    Float x[M ? M : kMostOfGroup];
    for (int i = 0; i < m; ++i) x[i] = L::template read<Float>(lanes + i * kWidth);
    group<M>(x, m, n, position, channel);
    std::memcpy(lanes, x, m * sizeof(Float));
  }

  static void add_magnitudes(const float* lanes, int64_t channels, float* sums) {
    for (int64_t c = 0; c < channels; ++c) {
      add(sums + 2 * c * kWidth, absolute(L::template read<Float>(lanes + c * kWidth)));
    }
  }

  void scale_channels(const NmSpan& s, int64_t c0, int64_t channels, const float* factors) const {
    for (int64_t p = s.first_position; p < s.last_position; ++p) {
      Storage* row = static_cast<Storage*>(a.out) + (s.sample * a.positions + p) * a.channels + c0;
      for (int64_t c = 0; c < channels; c += kWidth) {
        const Float v = E::template value<L>(load(row + c, channels - c));
        store(row + c, channels - c, E::template bits<L>(v * L::template read<Float>(factors + c)));
      }
    }
  }

  // Row-major memory whose groups of M are whole, so that none straddles two vectors.
  template <int M>
  void rows(const NmSpan& s, float* scratch) const {
    const bool random = a.function == NmFunction::kRandom;
    const bool rescale = a.function == NmFunction::kRescaled;
    const int n = static_cast<int>(a.n);
    const int64_t c0 = a.first_channel(s.first_group);
    const int64_t channels = a.first_channel(s.last_group) - c0;
    float *before = scratch, *after = scratch + channels + kWidth;  // sums by channel
    if (rescale) std::fill(before, after + channels + kWidth, 0.0f);
    for (int64_t p = s.first_position; p < s.last_position; ++p) {
      const int64_t position = s.sample * a.positions + p, at = position * a.channels + c0;
      const Storage* from = static_cast<const Storage*>(a.x) + at;
      Storage* to = static_cast<Storage*>(a.out) + at;
      for (int64_t c = 0; c < channels; c += kWidth) {
        const Int x = reinterpret_cast<Int>(load(from + c, channels - c));
        const Int size = x & 0x7fffffff;
        Int key = size;
        if (random) {
          const Int special = size >= E::kInfinite;
          const Int drawn = reinterpret_cast<Int>(draw_channels<L>(a, position, c0 + c) >> 1);
          key = (special & 0x7fffffff) | (~special & drawn);
        }
        const Int keep = keep_largest_lanes<L, M>(key, n);
        store(to + c, channels - c, reinterpret_cast<Word>(x & keep));
        if (rescale) {
          add(before + c, absolute(reinterpret_cast<Float>(x)));
          add(after + c, absolute(reinterpret_cast<Float>(x & keep)));
        }
      }
    }
    if (!rescale) return;
    for (int64_t c = 0; c < channels; c += kWidth) {
      const Float factor =
          ratio(L::template read<Float>(before + c), L::template read<Float>(after + c));
      std::memcpy(before + c, &factor, sizeof factor);
    }
    scale_channels(s, c0, channels, before);
  }

  static void add(float* sum, Float v) {
    const Float total = L::template read<Float>(sum) + v;
    std::memcpy(sum, &total, sizeof total);
  }

  // True when rows() can prune this by groups of M.
  template <int M>
  bool fits_rows() const {
    return M <= kWidth && a.m == M && raw() && a.conv_channels() % M == 0;
  }

  void run(const NmSpan& s, float* scratch) const {
    if (a.row_major) {
      if (fits_rows<2>()) return rows<2>(s, scratch);
      if (fits_rows<4>()) return rows<4>(s, scratch);
      if constexpr (kWidth >= 8) {
        if (fits_rows<8>()) return rows<8>(s, scratch);
      }
      if constexpr (kWidth >= 16) {
        if (fits_rows<16>()) return rows<16>(s, scratch);
      }
      return row_major(s, scratch);
    }
    const bool whole = a.conv_channels() % a.m == 0;
    if (whole && a.m == 4) return feature_major<4>(s);
    if (whole && a.m == 8) return feature_major<8>(s);
    feature_major<0>(s);
  }
};

// scratch: nm_scratch() floats, used with row-major memory.
template <class V>
void nm_prune(const NmPrune& a, const NmSpan& s, float* scratch) {
  if (NmHalves<V>{a}.run(s)) return;
  if (a.element == Element::kFloat32) return NmKernel<V, Float32>{a}.run(s, scratch);
  if (a.element == Element::kBfloat16) return NmKernel<V, Bfloat16>{a}.run(s, scratch);
  NmKernel<V, Float16>{a}.run(s, scratch);
}

}  // namespace fxprune
