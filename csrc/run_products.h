// Runs two 1x1 convolutions, the first of which only the second reads, block by block of pixels:
// what lies between, the wide value of a transformer-like block, stays in the core's L2. T: float
// or Bf16.
#pragma once

#include <algorithm>
#include <cstdint>

#include "caches.h"
#include "fxprune/kernels.h"
#include "parallel.h"
#include "run.h"
#include "run_bf16.h"

namespace fxprune {

// Pixels that the feature-major kernel takes at once.
inline int64_t block_pixels(const float*) {
  return kernels().width;
}
inline int64_t block_pixels(const Bf16*) {
  return kPixels;
}

// One unit of a product without a gate, in the caller's thread.
inline void multiply(const TileGemm& a, const TileSpan& span) {
  kernels().tile_gemm_feature_major(a, span, nullptr);
}

// Planes of a part of an image, in this thread's room of a slot: the given pixels of the channels
// [first, end). Pixel p of channel c lies at moved[c * pitch + p].
template <class T>
struct PartPlanes {
  T* moved;
  int64_t pitch;
  template <int Slot>
  static PartPlanes of(int64_t first, int64_t end, PixelRange pixels) {
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t pitch = (pixels.end - pixels.begin + kLine - 1) / kLine * kLine;
    T* room = scratch_of<Slot, T>((end - first) * pitch);
    return {room - first * pitch - pixels.begin, pitch};
  }
};

// The pixels of a 1x1 convolution whose input lies in `planes`.
template <class T>
void run_product_of(const TileGemmOf<T>& product, const PartPlanes<T>& planes, PixelRange pixels) {
  const int64_t count = pixels.end - pixels.begin, block = block_pixels(product.x);
  TileGemmOf<T> a = product;
  a.m = count;
  a.x = planes.moved + pixels.begin;
  a.x_gap = planes.pitch - count;
  a.out = product.out + pixels.begin;
  a.out_gap = product.ldo() - count;
  if (a.residual) a.residual = product.residual + pixels.begin;
  a.residual_gap = product.ldr() - count;
  const int64_t blocks = (count + block - 1) / block, parts = weight_parts(product);
  for (int64_t p = 0; p < parts; ++p)
    multiply(a, {0, 0, blocks, tile_cut(a, p, parts), tile_cut(a, p + 1, parts)});
}

// Blocks of pixels that a pair is cut in, a multiple of the threads: as many as keep the value
// between in L2, unless too little is left of one. Below 2, the two run one after the other.
template <class T>
int64_t product_blocks(const TileGemmOf<T>& first, int64_t pool) {
  const int64_t room = of_l2(512 * 1024) / sizeof(T);  // numbers of the value between
  constexpr int64_t kLeast = 96;                       // pixels
  const int64_t fit = (first.n * first.m + room - 1) / room;
  return std::min((fit + pool - 1) / pool, first.m / kLeast / pool) * pool;
}

// One image; features of both lie side by side, neither has a gate, the first no residual.
template <class T>
void run_products(const TileGemmOf<T>& first, const TileGemmOf<T>& second, int64_t blocks,
                  int64_t pool) {
  const int64_t width = block_pixels(first.x), lines = (first.m + width - 1) / width;
  for_each_unit(blocks, pool, [&](int64_t block) {
    const TileSpan span = {0, lines * block / blocks, lines * (block + 1) / blocks, 0, first.tiles};
    const PixelRange pixels = {span.begin * width, std::min(span.end * width, first.m)};
    const auto planes = PartPlanes<T>::template of<3>(0, first.n, pixels);
    TileGemmOf<T> wide = first;
    wide.out = planes.moved;
    wide.out_gap = planes.pitch - first.m;
    multiply(wide, span);
    run_product_of(second, planes, pixels);
  });
}

}  // namespace fxprune
