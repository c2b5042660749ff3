// The matrix unit: tiles of 16 rows of 64 bytes, and products of them. Include only under a target
// pragma that enables amx-tile and amx-bf16 beside those of vec_avx512_bf16.h.
#pragma once

#include <immintrin.h>

#include "fxprune/pair_products.h"
#include "fxprune/vec_avx512_bf16.h"

namespace fxprune {

struct Amx : Avx512Bf16Vectors<Amx> {};

// Configures the unit for this thread as long as it lives. Registers: 0 to 3 are sums, two strips
// by two halves of the pixels, 4 and 5 strips of weights, 6 and 7 halves of the pixels.
template <>
struct PairProducts<Amx> {
  PairProducts() = default;
  PairProducts(const PairProducts&) = delete;
  PairProducts& operator=(const PairProducts&) = delete;
  ~PairProducts() {
    if (rows_ != 0) _tile_release();
  }

  void run(const Bf16* image, int64_t stride, int64_t depth, int64_t rows, int64_t strips,
           const Bf16* pairs, int64_t halves, bool add, float* sums) {
    if (rows != rows_) configure(rows);
    const int64_t block = rows * kDeep;
    const auto product = strips == 2   ? halves == 2 ? &sum<true, true> : &sum<true, false>
                         : halves == 2 ? &sum<false, true>
                                       : &sum<false, false>;
    product(image, image + stride, depth, block, pairs, add, sums);
  }

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };

  void configure(int64_t rows) {
    Config config;
    for (int t = 0; t < 8; ++t) {
      config.row_bytes[t] = 64;
      config.rows[t] = static_cast<uint8_t>(t >= 6 ? 16 : rows);
    }
    _tile_loadconfig(&config);
    rows_ = rows;
  }

  static constexpr int64_t kPairBytes = 4 * kPixels, kBlock = 16 * 2 * kPixels;

  // `block`: numbers of one block of a strip, which is also what a strip takes of the sums, because
  // kDeep == kPixels.
  // below, kBelow: the second strip, if there is one. kRight: the second half of the pixels is
  // asked for, too.
  template <bool kBelow, bool kRight>
  static void sum(const Bf16* image, const Bf16* below, int64_t depth, int64_t block,
                  const Bf16* pairs, bool add, float* sums) {
    constexpr int64_t kHalf = kPixels / 2;
    if (add) {
      _tile_loadd(0, sums, kPairBytes);
      if constexpr (kRight) _tile_loadd(1, sums + kHalf, kPairBytes);
      if constexpr (kBelow) _tile_loadd(2, sums + block, kPairBytes);
      if constexpr (kBelow && kRight) _tile_loadd(3, sums + block + kHalf, kPairBytes);
    } else {
      _tile_zero(0);
      if constexpr (kRight) _tile_zero(1);
      if constexpr (kBelow) _tile_zero(2);
      if constexpr (kBelow && kRight) _tile_zero(3);
    }
    for (int64_t d = 0; d < depth; ++d) {
      _tile_loadd(6, pairs + d * kBlock, kPairBytes);
      _tile_loadd(4, image + d * block, 64);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kRight) {
        _tile_loadd(7, pairs + d * kBlock + kPixels, kPairBytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kBelow) {
        _tile_loadd(5, below + d * block, 64);
        _tile_dpbf16ps(2, 5, 6);
      }
      if constexpr (kBelow && kRight) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, kPairBytes);
    if constexpr (kRight) _tile_stored(1, sums + kHalf, kPairBytes);
    if constexpr (kBelow) _tile_stored(2, sums + block, kPairBytes);
    if constexpr (kBelow && kRight) _tile_stored(3, sums + block + kHalf, kPairBytes);
  }

  int64_t rows_ = 0;
};

}  // namespace fxprune
