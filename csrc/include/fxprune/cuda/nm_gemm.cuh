// A product whose left operand is pruned to two in four:
//
//   out[r, n] = sum over k of kept(x)[r, k] * w[k, n],  x: (rows, k), w: (k, n), row-major
//
// kept() leaves the two largest magnitudes of every four k of a row, ties to the lower k; a last
// group of 1, 2 or 3 keeps 1, 1 or 2. What is 2:4 already stays as it is. 16-bit elements, sums in
// float, on mma.sp.
#pragma once

#include "fxprune/cuda/nm_multiply.cuh"
#include "fxprune/cuda/nm_select.cuh"
#include "fxprune/cuda/stage_ring.cuh"
#include "fxprune/cuda/tile_gemm_args.cuh"

namespace fxprune::gpu {

struct NmGemmArgs {
  const void* x;
  const void* weight;
  void* out;
  void* packed;      // (rows, k_blocks * 32) kept elements, 16 bits each
  uint16_t* places;  // (row_blocks, k_blocks, 32 lanes, 2), see place_at()
  int64_t rows, k, n;
  bool vector_x, vector_n;  // 16-byte accesses to rows of x; of the weight and out

  FXPRUNE_BOTH int64_t k_blocks() const { return (k + kNmBlock - 1) / kNmBlock; }
  FXPRUNE_BOTH int64_t row_blocks() const { return (rows + 15) / 16; }
  FXPRUNE_BOTH int64_t packed_elements() const { return rows * k_blocks() * (kNmBlock / 2); }
  FXPRUNE_BOTH int64_t places_elements() const { return row_blocks() * k_blocks() * 64; }
  // Where the places of the 16 k from `sixteen` * 16 on of a row lie: in the register of the lane
  // that the instruction reads them from.
  FXPRUNE_BOTH int64_t place_at(int64_t row, int64_t sixteen) const {
    const int64_t lane = row % 8 * 4 + sixteen % 4;
    return ((row / 16 * k_blocks() + sixteen / 4) * 32 + lane) * 2 + row % 16 / 8;
  }
};

// Finds what is kept. A thread does 16 k of a row; rows past the last have no kept elements but
// need places, which must be two different ones.
struct NmPack {
  using Args = NmGemmArgs;
  static constexpr int kThreads = 256, kBlocks = 4;

  static FXPRUNE_GPU void run(const Args& a) {
    const int64_t across = a.k_blocks() * 4, all = a.row_blocks() * 16 * across;
    for (int64_t i = block(0) * kThreads + thread(); i < all; i += blocks(0) * kThreads) {
      const int64_t row = i / across, sixteen = i % across, first = sixteen * 16;
      uint16_t element[16];
      load(a, row, first, element);
      uint16_t kept[8];
      uint32_t places = 0;
      FXPRUNE_UNROLLED
      for (int group = 0; group < 4; ++group) {
        const int64_t left = row < a.rows ? a.k - first - 4 * group : 0;
        int32_t key[4];
        FXPRUNE_UNROLLED
        for (int j = 0; j < 4; ++j) key[j] = j < left ? element[4 * group + j] & 0x7fff : -1;
        const int count = left >= 3 ? 2 : left >= 1 ? 1 : 0;
        const uint32_t keep = keep_largest(key, count);
        // The lower and the higher place. Fewer than two: the element is put where it fits, beside
        // a zero.
        const bool none = keep == 0, last_alone = keep == 8;
        const int low = none || keep & 1 ? 0 : keep & 2 ? 1 : keep & 4 ? 2 : 2;
        int high = 3;
        FXPRUNE_UNROLLED
        for (int j = 3; j > 0; --j) {
          if (j > low && (keep >> j & 1)) high = j;
        }
        kept[2 * group] = none || last_alone ? uint16_t{0} : pick(element, 4 * group, low);
        kept[2 * group + 1] = keep >> high & 1 ? pick(element, 4 * group, high) : uint16_t{0};
        places |= static_cast<uint32_t>(low | high << 2) << 4 * group;
      }
      store_global<uint16_t>(a.places + a.place_at(row, sixteen), static_cast<uint16_t>(places));
      if (row < a.rows) {
        char* to = static_cast<char*>(a.packed) + (row * across + sixteen) * 16;
        store_global<Quad>(to, quad_of(kept));
      }
    }
  }

  static FXPRUNE_GPU void load(const Args& a, int64_t row, int64_t first, uint16_t (&to)[16]) {
    const uint16_t* from = static_cast<const uint16_t*>(a.x) + row * a.k + first;
    FXPRUNE_UNROLLED
    for (int i = 0; i < 16; i += 8) {
      const bool real = row < a.rows && first + i < a.k;
      if (a.vector_x) {
        Quad quad = {};
        if (real) quad = load_global<Quad>(from + i);
        FXPRUNE_UNROLLED
        for (int j = 0; j < 8; ++j) {
          to[i + j] = static_cast<uint16_t>(quad.word[j / 2] >> (16 * (j % 2)) & 0xffff);
        }
      } else {
        FXPRUNE_UNROLLED
        for (int j = 0; j < 8; ++j) {
          const bool inside = row < a.rows && first + i + j < a.k;
          to[i + j] = inside ? load_global<uint16_t>(from + i + j) : uint16_t{0};
        }
      }
    }
  }

  // element[base + place], without addressing registers by a variable.
  static FXPRUNE_GPU uint16_t pick(const uint16_t (&element)[16], int base, int place) {
    uint16_t found = element[base];
    FXPRUNE_UNROLLED
    for (int j = 1; j < 4; ++j) found = place == j ? element[base + j] : found;
    return found;
  }
};

// A block of 4 warps computes 128 rows x 64 columns, 64 k at a time, kStages of them in flight.
template <class T>
struct NmGemm {
  using Args = NmGemmArgs;
  static constexpr int kThreads = 128, kBlocks = 3, kRows = 128, kColumns = kPanel, kStages = 4;
  static constexpr int kLeftBytes = kRows * kKeptRowBytes, kRightBytes = kPanelBytes;
  static constexpr int kPlaceBytes = kRows / 16 * kPlaceBlockBytes;
  static constexpr int kStageBytes = kLeftBytes + kRightBytes + kPlaceBytes;
  static constexpr int kSharedBytes = kStages * kStageBytes;

  static FXPRUNE_GPU void fill(const Args& a, int64_t row, int64_t column, int64_t k_block,
                               char* stage) {
    // A thread always copies the same chunk of every so many rows.
    constexpr int kLeftStep = kThreads / 4, kRightStep = kThreads / (kColumns / 8);
    const int r = thread() / 4, c = thread() % 4;
    const char* packed =
        static_cast<const char*>(a.packed) + ((row + r) * a.k_blocks() + k_block) * 64 + c * 16;
    FXPRUNE_UNROLLED
    for (int i = 0; i < kRows / kLeftStep; ++i) {
      const bool real = row + r + i * kLeftStep < a.rows;
      copy_async<16>(stage + kept_offset(r + i * kLeftStep, c), real ? packed : a.packed, real);
      packed += kLeftStep * 64 * a.k_blocks();
    }
    if (thread() < kRows / 16 * 8) {
      const int64_t row_block = row / 16 + thread() / 8;
      const bool real = row_block < a.row_blocks();
      const int64_t chunk = real ? (row_block * a.k_blocks() + k_block) * 8 + thread() % 8 : 0;
      copy_async<16>(stage + kLeftBytes + kRightBytes + thread() * 16,
                     reinterpret_cast<const char*>(a.places) + chunk * 16, true);
    }
    const int k = thread() / (kColumns / 8), run = thread() % (kColumns / 8) * 8;
    const int64_t left = column + run < a.n ? a.n - column - run : 0;
    int64_t from_k = k_block * kNmBlock + k;
    const uint16_t* weight = static_cast<const uint16_t*>(a.weight) + from_k * a.n + column + run;
    char* right = stage + kLeftBytes;
    FXPRUNE_UNROLLED
    for (int i = 0; i < kNmBlock / kRightStep; ++i) {
      const bool real = from_k < a.k && left > 0;
      char* to = right + panel_offset(k + i * kRightStep, run);
      if (a.vector_n) {
        copy_async<16>(to, real ? static_cast<const void*>(weight) : a.weight, real);
      } else {
        uint16_t element[8];
        FXPRUNE_UNROLLED
        for (int j = 0; j < 8; ++j) {
          element[j] = real && j < left ? load_global<uint16_t>(weight + j) : uint16_t{0};
        }
        store_shared<Quad>(to, quad_of(element));
      }
      from_k += kRightStep;
      weight += kRightStep * a.n;
    }
  }

  static FXPRUNE_GPU void run(const Args& a) {
    const int64_t across = (a.n + kColumns - 1) / kColumns;
    const int64_t row = block(0) / across * kRows, column = block(0) % across * kColumns;
    const int64_t stages = a.k_blocks();
    float sums[4][4][4] = {};
    const auto multiply = [&](int64_t, const char* stage) {
      // Warps: 2 along rows of 64, 2 along columns of 32.
      multiply_kept<T>(stage + thread() / 64 * 64 * kKeptRowBytes,
                       stage + kLeftBytes + kRightBytes + thread() / 64 * 4 * kPlaceBlockBytes,
                       stage + kLeftBytes, thread() / 32 % 2 * 32, sums);
    };
    through_ring<kStages, kStageBytes>(
        shared_memory(), stages, [&](int64_t i, char* to) { fill(a, row, column, i, to); },
        multiply);

    const int lane = thread() % 32, warp = thread() / 32;
    FXPRUNE_UNROLLED
    for (int i = 0; i < 8; ++i) {
      float v[4][2], out[8];
      FXPRUNE_UNROLLED
      for (int j = 0; j < 8; ++j) v[j / 2][j % 2] = sums[i / 2][j / 2][i % 2 * 2 + j % 2];
      gather_columns(v, out);
      store(a, row + warp / 2 * 64 + 8 * i + lane / 4, column + warp % 2 * 32 + lane % 4 * 8, out);
    }
  }

  static FXPRUNE_GPU void store(const Args& a, int64_t row, int64_t column, const float (&v)[8]) {
    if (row >= a.rows || column >= a.n) return;
    T* out = static_cast<T*>(a.out) + row * a.n + column;
    if (a.vector_n) return store_global<Quad>(out, Pack<T>::pack(v));
    FXPRUNE_UNROLLED
    for (int j = 0; j < 8; ++j) {
      if (column + j < a.n) store_global<T>(out + j, from_float<T>(v[j]));
    }
  }
};

// All of `a` is set but the vectors.
template <class T, class Launcher>
void nm_gemm(Launcher& launcher, NmGemmArgs a) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  a.vector_x = a.k % 8 == 0 && aligned(a.x);
  a.vector_n = a.n % 8 == 0 && aligned(a.weight) && aligned(a.out);
  if (a.k_blocks() > 0) {
    const int64_t wanted = (a.row_blocks() * 16 * a.k_blocks() * 4 + 255) / 256;
    const int64_t grid[3] = {wanted < (int64_t{1} << 20) ? wanted : int64_t{1} << 20, 1, 1};
    launcher.template launch<NmPack>(grid, 0, a);
  }
  using Kernel = NmGemm<T>;
  const int64_t grid[3] = {(a.rows + Kernel::kRows - 1) / Kernel::kRows *
                               ((a.n + Kernel::kColumns - 1) / Kernel::kColumns),
                           1, 1};
  launcher.template launch<Kernel>(grid, Kernel::kSharedBytes, a);
}

}  // namespace fxprune::gpu
