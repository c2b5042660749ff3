// Runs a block of a network in bfloat16, 1x1 convolution -> depthwise -> 1x1 convolution, band by
// band of the last one's pixels, as run_block.h does in float: what lies between stays in the
// caches of the core that computes it, and cores meet once a block.
//
// Neighbouring bands both compute the rows between them. One image.
#pragma once

#include <algorithm>
#include <cstdint>

#include "run_bf16.h"

namespace fxprune {

// Bands that a block is cut in: as many as keep one's values in L2, a multiple of the threads. 0
// where too little is left of one beside the rows computed twice.
inline int64_t block_bands(const DepthwiseTapsBf16& d, int64_t pool) {
  constexpr int64_t kBand = 256 * 1024;  // numbers of the depthwise result of a band
  constexpr int64_t kLeastLines = 6, kLeastRows = 7;
  const int64_t width = depthwise_width(d, d.x), length = band_length(d, width);
  const int64_t most = length / (d.flat(width) ? kLeastLines : kLeastRows);
  const int64_t fit = (d.channels * d.out_h * d.out_w + kBand - 1) / kBand;
  if (pool == 1) return std::max<int64_t>(1, std::min(fit, most));
  return std::min((fit + pool - 1) / pool, most / pool) * pool;
}

// The pixels of a 1x1 convolution whose input lies in planes of `pitch` numbers; `planes` is moved
// back so that pixel p of feature k is planes[k * pitch + p].
inline void run_product_of(const TileGemmBf16& product, const Bf16* planes, int64_t pitch,
                           PixelRange pixels) {
  const int64_t count = pixels.end - pixels.begin;
  TileGemmBf16 a = product;
  a.m = count;
  a.x = planes + pixels.begin;
  a.x_gap = pitch - count;
  a.out = product.out + pixels.begin;
  a.out_gap = product.ldo() - count;
  if (a.residual) a.residual = product.residual + pixels.begin;
  a.residual_gap = product.ldr() - count;
  multiply(a, {0, 0, (count + kPixels - 1) / kPixels, 0, a.tiles});
}

inline void run_block(const TileGemmBf16& expand, const DepthwiseTapsBf16& d,
                      const TileGemmBf16& project, int64_t bands, int64_t pool) {
  const int64_t width = depthwise_width(d, d.x), length = band_length(d, width),
                size = d.out_h * d.out_w, line = d.flat(width) ? width : d.out_w;
  for_each_unit(bands, pool, [&](int64_t band) {
    const int64_t begin = length * band / bands, end = length * (band + 1) / bands;
    const PixelRange pixels = {begin * line, std::min(end * line, size)};
    const int64_t pitch = (pixels.end - pixels.begin + kPixels - 1) / kPixels * kPixels;
    Bf16* planes = scratch_of<3, Bf16>(d.channels * pitch) - pixels.begin;
    DepthwiseTapsBf16 taps = d;
    taps.out = planes;
    taps.out_gap = pitch - size;
    run_expand_band(expand, taps, {0, 0, 0, 0, expand.tiles}, begin, end);
    run_product_of(project, planes, pitch, pixels);
  });
}

// Two 1x1 convolutions, the first of which only the second reads (run_products.h).
inline int64_t product_blocks(const TileGemmBf16& first, int64_t pool) {
  constexpr int64_t kBlock = 256 * 1024;  // numbers of the value between
  constexpr int64_t kLeast = 3;           // blocks of pixels
  const int64_t most = (first.m + kPixels - 1) / kPixels / kLeast;
  const int64_t fit = (first.n * first.m + kBlock - 1) / kBlock;
  return std::min((fit + pool - 1) / pool, most / pool) * pool;
}

inline void run_products(const TileGemmBf16& first, const TileGemmBf16& second, int64_t blocks,
                         int64_t pool) {
  const int64_t lines = (first.m + kPixels - 1) / kPixels;
  for_each_unit(blocks, pool, [&](int64_t block) {
    const TileSpan span = {0, lines * block / blocks, lines * (block + 1) / blocks, 0, first.tiles};
    const PixelRange pixels = {span.begin * kPixels, std::min(span.end * kPixels, first.m)};
    const int64_t pitch = (span.end - span.begin) * kPixels;
    Bf16* planes = scratch_of<3, Bf16>(first.n * pitch) - pixels.begin;
    TileGemmBf16 wide = first;
    wide.out = planes;
    wide.out_gap = pitch - first.m;
    multiply(wide, span);
    run_product_of(second, planes, pitch, pixels);
  });
}

}  // namespace fxprune
