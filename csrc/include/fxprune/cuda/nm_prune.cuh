// n:m pruning of a gradient on the GPU: of every m consecutive channels at one position, n stay.
// The functions, their ties and their random numbers are those of fxprune/nm_prune_lanes.h, bit for
// bit, but for the order in which rescaled magnitude adds up a channel.
//
// A thread holds one group at one position in registers. Feature-major (samples, channels,
// positions), neighbouring threads take neighbouring positions; row-major (samples, positions,
// channels), neighbouring groups.
#pragma once

#include <cmath>

#include "fxprune/cuda/nm_select.cuh"
#include "fxprune/nm_prune.h"

namespace fxprune::gpu {

struct NmPruneArgs {
  const void* x;
  void* out;
  float* factors;      // (samples, channels), kRescaled only
  const int64_t* key;  // counters on the GPU, or null
  int64_t key_count;
  uint64_t state;  // of SplitMix64, over the counters that the host knows
  int64_t layer;
  NmFunction function;
  bool row_major;
  int64_t samples, channels, positions, conv_groups, n, m;
  // Set by nm_prune(): lanes of a block along what lies together in memory, and whether a group is
  // read in its widest units.
  int lanes;
  bool vector;

  FXPRUNE_BOTH int64_t conv_channels() const { return channels / conv_groups; }
  FXPRUNE_BOTH int64_t groups_per_conv_group() const { return (conv_channels() + m - 1) / m; }
  FXPRUNE_BOTH int64_t groups() const { return conv_groups * groups_per_conv_group(); }
  FXPRUNE_BOTH bool random() const {
    return function == NmFunction::kRandom || function == NmFunction::kMvue;
  }
};

// One group of channels: where it begins and how many of it there are and stay.
struct NmMembers {
  int64_t channel;
  int size, kept;

  FXPRUNE_GPU NmMembers(const NmPruneArgs& a, int64_t group) {
    const int64_t per = a.groups_per_conv_group(), first = group % per * a.m;
    channel = group / per * a.conv_channels() + first;
    const int64_t left = a.conv_channels() - first;
    size = static_cast<int>(a.m < left ? a.m : left);
    kept = static_cast<int>((a.n * size + a.m - 1) / a.m);
  }
};

template <class T>
struct NmElement;
template <>
struct NmElement<float> {
  static constexpr int32_t kInfinite = 0x7f800000;
  static FXPRUNE_GPU uint32_t word(float x) { return bits_of_float(x); }
  static FXPRUNE_GPU float element(uint32_t word) { return float_of_bits(word); }
};
template <class T, int32_t Infinite>
struct NmElement16 {
  static constexpr int32_t kInfinite = Infinite;
  static FXPRUNE_GPU uint32_t word(T x) { return static_cast<uint32_t>(x.bits) << 16; }
  static FXPRUNE_GPU T element(uint32_t word) { return T{static_cast<uint16_t>(word >> 16)}; }
};
template <>
struct NmElement<Half> : NmElement16<Half, 0x7c000000> {};
template <>
struct NmElement<Bfloat> : NmElement16<Bfloat, 0x7f800000> {};

// A group at one position: M is m rounded up to 4, 8, 16 or 32. Words hold an element's bits
// aligned to the left, so that they order as magnitudes do.
template <class T, int M>
struct NmGroup {
  using E = NmElement<T>;
  static constexpr int kBytes = M * static_cast<int>(sizeof(T));
  struct alignas(kBytes < 16 ? kBytes : 16) Unit {
    uint32_t word[(kBytes < 16 ? kBytes : 16) / 4];
  };
  static constexpr int kUnitWords = static_cast<int>(sizeof(Unit)) / 4;
  static constexpr int kUnits = kBytes / static_cast<int>(sizeof(Unit));

  static FXPRUNE_GPU void load(const NmPruneArgs& a, const T* from, int64_t step, int size,
                               uint32_t (&word)[M]) {
    if (a.vector) {
      FXPRUNE_UNROLLED
      for (int u = 0; u < kUnits; ++u) {
        const Unit unit = load_global<Unit>(reinterpret_cast<const char*>(from) + u * sizeof(Unit));
        FXPRUNE_UNROLLED
        for (int i = 0; i < kUnitWords; ++i) {
          const int at = u * kUnitWords + i;
          if constexpr (sizeof(T) == 4) {
            word[at] = unit.word[i];
          } else {
            word[2 * at] = unit.word[i] << 16;
            word[2 * at + 1] = unit.word[i] & 0xffff0000u;
          }
        }
      }
    } else {
      FXPRUNE_UNROLLED
      for (int i = 0; i < M; ++i) word[i] = i < size ? E::word(load_global<T>(from + i * step)) : 0;
    }
  }

  static FXPRUNE_GPU void store(const NmPruneArgs& a, T* to, int64_t step, int size,
                                const uint32_t (&word)[M]) {
    if (a.vector) {
      FXPRUNE_UNROLLED
      for (int u = 0; u < kUnits; ++u) {
        Unit unit;
        FXPRUNE_UNROLLED
        for (int i = 0; i < kUnitWords; ++i) {
          const int at = u * kUnitWords + i;
          if constexpr (sizeof(T) == 4) {
            unit.word[i] = word[at];
          } else {
            unit.word[i] = word[2 * at] >> 16 | (word[2 * at + 1] & 0xffff0000u);
          }
        }
        store_global<Unit>(reinterpret_cast<char*>(to) + u * sizeof(Unit), unit);
      }
    } else {
      FXPRUNE_UNROLLED
      for (int i = 0; i < M; ++i) {
        if (i < size) store_global<T>(to + i * step, E::element(word[i]));
      }
    }
  }

  // Members that stay when the largest do, or with kRandom n at random; Inf and NaN come first.
  static FXPRUNE_GPU uint32_t kept(const NmPruneArgs& a, const uint32_t (&word)[M], int size, int n,
                                   int64_t channel, uint32_t place, int32_t infinite) {
    int32_t key[M];
    FXPRUNE_UNROLLED
    for (int i = 0; i < M; ++i) key[i] = static_cast<int32_t>(word[i] & 0x7fffffffu);
    if (a.function == NmFunction::kRandom) {
      FXPRUNE_UNROLLED
      for (int i = 0; i < M; ++i) {
        const int32_t drawn = static_cast<int32_t>(draw_channel(place, channel + i) >> 1);
        key[i] = key[i] >= infinite ? 0x7fffffff : drawn;
      }
    }
    FXPRUNE_UNROLLED
    for (int i = 0; i < M; ++i) key[i] = i < size ? key[i] : -1;
    return keep_largest(key, n);
  }

  // A factor that restores a sum of magnitudes; 1 where that is no number.
  static FXPRUNE_GPU float ratio(float before, float after) {
    const float r = before / after;
    return (bits_of_float(r) & 0x7f800000u) != 0x7f800000u && after > 0.0f ? r : 1.0f;
  }

  // Prunes the words of one group in place. factors: of its channels, kRescaled only.
  static FXPRUNE_GPU void prune(const NmPruneArgs& a, uint32_t (&word)[M], const NmMembers& g,
                                uint32_t place, const float* factors) {
    if (a.function <= NmFunction::kRescaled) {
      const uint32_t stay = kept(a, word, g.size, g.kept, g.channel, place, E::kInfinite);
      FXPRUNE_UNROLLED
      for (int i = 0; i < M; ++i) word[i] = stay >> i & 1 ? word[i] : 0;
      if (a.function == NmFunction::kRescaled) {
        FXPRUNE_UNROLLED
        for (int i = 0; i < M; ++i) {
          const float factor = i < g.size ? load_global<float>(factors + i) : 1.0f;
          word[i] = E::word(from_float<T>(to_float(E::element(word[i])) * factor));
        }
      }
      return;
    }
    float x[M], before = 0.0f, after = 0.0f;
    bool special = false;
    FXPRUNE_UNROLLED
    for (int i = 0; i < M; ++i) {
      x[i] = to_float(E::element(word[i]));
      word[i] = bits_of_float(x[i]);
      special = special || (word[i] & 0x7fffffffu) >= 0x7f800000u;
      before += fabsf(x[i]);
    }
    const uint32_t stay = kept(a, word, g.size, g.kept, g.channel, place, 0x7f800000);
    if (a.function == NmFunction::kMvue && !special && before < float_of_bits(0x7f800000u)) {
      sample_unbiased(x, g.kept, draw_channel(place, g.channel));
    } else {
      FXPRUNE_UNROLLED
      for (int i = 0; i < M; ++i) {
        x[i] = stay >> i & 1 ? x[i] : 0.0f;
        after += fabsf(x[i]);
      }
      const float factor = a.function == NmFunction::kGroupRescaled ? ratio(before, after) : 1.0f;
      FXPRUNE_UNROLLED
      for (int i = 0; i < M; ++i) x[i] *= factor;
    }
    FXPRUNE_UNROLLED
    for (int i = 0; i < M; ++i) word[i] = E::word(from_float<T>(x[i]));
  }
};

// Where a thread of a block works: lanes of it go along what lies together in memory (positions, or
// row-major groups), the others along the rest.
struct NmLane {
  int along, across;
  FXPRUNE_GPU explicit NmLane(const NmPruneArgs& a)
      : along(thread() % a.lanes), across(thread() / a.lanes) {}
};

// The two words that random numbers start from; thread 0 mixes them for all.
FXPRUNE_GPU void nm_key(const NmPruneArgs& a, uint32_t (&words)[2]) {
  words[0] = words[1] = 0;
  if (!a.random()) return;
  if (thread() == 0) {
    uint64_t state = a.state;
    for (int64_t i = 0; i < a.key_count; ++i) {
      state = add_counter(state, static_cast<uint64_t>(load_global<int64_t>(a.key + i)));
    }
    store_shared<uint64_t>(shared_memory(), add_counter(state, static_cast<uint64_t>(a.layer)));
  }
  barrier();
  const uint64_t state = load_shared<uint64_t>(shared_memory());
  words[0] = static_cast<uint32_t>(state);
  words[1] = static_cast<uint32_t>(state >> 32);
}

// Grid: (blocks along, blocks across).
template <class T, int M>
struct NmPruneGroups {
  using Args = NmPruneArgs;
  static constexpr int kThreads = 128, kBlocks = M == 4 ? 8 : M == 8 ? 6 : M == 16 ? 5 : 3;
  static constexpr int kSharedBytes = 8;

  static FXPRUNE_GPU void run(const Args& a) {
    uint32_t words[2];
    nm_key(a, words);
    const NmLane lane(a);
    const int64_t groups = a.groups();
    const int64_t along = a.row_major ? groups : a.positions;
    const int64_t across = a.samples * (a.row_major ? a.positions : groups);
    const int64_t step = a.row_major ? 1 : a.positions;
    const int rows = kThreads / a.lanes;
    for (int64_t r = block(1) * rows + lane.across; r < across; r += blocks(1) * rows) {
      for (int64_t c = block(0) * a.lanes + lane.along; c < along; c += blocks(0) * a.lanes) {
        const int64_t sample = r / (a.row_major ? a.positions : groups);
        const int64_t position = a.row_major ? r : sample * a.positions + c;  // over all samples
        const NmMembers g(a, a.row_major ? c : r - sample * groups);
        const int64_t at = a.row_major ? r * a.channels + g.channel
                                       : (sample * a.channels + g.channel) * a.positions + c;
        uint32_t word[M];
        NmGroup<T, M>::load(a, static_cast<const T*>(a.x) + at, step, g.size, word);
        const uint32_t place = a.random() ? draw_place(words, position) : 0;
        NmGroup<T, M>::prune(a, word, g, place, a.factors + sample * a.channels + g.channel);
        NmGroup<T, M>::store(a, static_cast<T*>(a.out) + at, step, g.size, word);
      }
    }
  }
};

// The factors of kRescaled: per sample and channel, the sum of magnitudes over that of what stays.
// A block adds up all positions of a few groups, in a fixed order. Grid: (groups / lanes, samples).
template <class T, int M>
struct NmPruneFactors {
  using Args = NmPruneArgs;
  static constexpr int kThreads = 128, kBlocks = M == 4 ? 8 : M == 8 ? 6 : M == 16 ? 4 : 2;
  static constexpr int kSharedBytes = kThreads * 8;

  static FXPRUNE_GPU void run(const Args& a) {
    const NmLane lane(a);
    const int64_t groups = a.groups(), step = a.row_major ? 1 : a.positions;
    // Feature-major, a block has one group and all lanes go along its positions.
    const int64_t group = a.row_major ? block(0) * a.lanes + lane.along : block(0);
    const int first = a.row_major ? lane.across : thread();
    const int stride = a.row_major ? kThreads / a.lanes : kThreads;
    const NmMembers g(a, group < groups ? group : 0);
    for (int64_t sample = block(1); sample < a.samples; sample += blocks(1)) {
      float before[M], after[M];
      FXPRUNE_UNROLLED
      for (int i = 0; i < M; ++i) before[i] = after[i] = 0.0f;
      for (int64_t p = first; p < a.positions && group < groups; p += stride) {
        const int64_t at = a.row_major ? (sample * a.positions + p) * a.channels + g.channel
                                       : (sample * a.channels + g.channel) * a.positions + p;
        uint32_t word[M];
        NmGroup<T, M>::load(a, static_cast<const T*>(a.x) + at, step, g.size, word);
        const uint32_t stay = NmGroup<T, M>::kept(a, word, g.size, g.kept, g.channel, 0, 0);
        FXPRUNE_UNROLLED
        for (int i = 0; i < M; ++i) {
          const float size = fabsf(to_float(NmElement<T>::element(word[i])));
          before[i] += size;
          after[i] += stay >> i & 1 ? size : 0.0f;
        }
      }
      float* factors = a.factors + sample * a.channels + g.channel;
      FXPRUNE_UNROLLED
      for (int i = 0; i < M; ++i) {
        add_up(before[i], after[i], a.row_major ? a.lanes : 1);
        if (first == 0 && group < groups && i < g.size) {
          store_global<float>(factors + i, NmGroup<T, M>::ratio(before[i], after[i]));
        }
      }
    }
  }

  // Sums over the threads whose numbers differ by multiples of `apart`, left in the first of each.
  static FXPRUNE_GPU void add_up(float& before, float& after, int apart) {
    char* own = shared_memory() + thread() * 8;
    store_shared<float>(own, before);
    store_shared<float>(own + 4, after);
    for (int half = kThreads / 2; half >= apart; half /= 2) {
      barrier();
      if (thread() < half) {
        before += load_shared<float>(own + half * 8);
        after += load_shared<float>(own + half * 8 + 4);
        store_shared<float>(own, before);
        store_shared<float>(own + 4, after);
      }
    }
    barrier();
  }
};

// All of `a` is set but `lanes` and `vector`.
template <class T, class Launcher>
void nm_prune(Launcher& launcher, NmPruneArgs a) {
  const auto run = [&](auto prune, auto factors, int most) {
    using Prune = decltype(prune);
    using Factors = decltype(factors);
    const int64_t bytes = a.m * int64_t{sizeof(T)};
    const auto aligned = [&](const void* p) {
      return reinterpret_cast<uintptr_t>(p) % (bytes < 16 ? bytes : 16) == 0;
    };
    a.vector = a.row_major && a.m == most && a.conv_channels() % a.m == 0 && aligned(a.x) &&
               aligned(a.out);
    const int64_t along = a.row_major ? a.groups() : a.positions;
    const int64_t across = a.samples * (a.row_major ? a.positions : a.groups());
    a.lanes = 1;
    while (a.lanes < 32 && a.lanes < along) a.lanes *= 2;
    const auto up = [](int64_t x, int64_t step) { return (x + step - 1) / step; };
    const auto least = [](int64_t x, int64_t y) { return x < y ? x : y; };
    if (a.function == NmFunction::kRescaled) {
      const int64_t grid[3] = {a.row_major ? up(a.groups(), a.lanes) : a.groups(),
                               least(a.samples, 65535), 1};
      launcher.template launch<Factors>(grid, Factors::kSharedBytes, a);
    }
    const int64_t grid[3] = {least(up(along, a.lanes), 1 << 20),
                             least(up(across, Prune::kThreads / a.lanes), 65535), 1};
    launcher.template launch<Prune>(grid, Prune::kSharedBytes, a);
  };
  if (a.m <= 4) return run(NmPruneGroups<T, 4>(), NmPruneFactors<T, 4>(), 4);
  if (a.m <= 8) return run(NmPruneGroups<T, 8>(), NmPruneFactors<T, 8>(), 8);
  if (a.m <= 16) return run(NmPruneGroups<T, 16>(), NmPruneFactors<T, 16>(), 16);
  run(NmPruneGroups<T, 32>(), NmPruneFactors<T, 32>(), 32);
}

}  // namespace fxprune::gpu
