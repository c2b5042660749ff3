// Runs two 1x1 convolutions, the first of which only the second reads, block by block of pixels:
// what lies between, the wide value of a transformer-like block, stays in the core's L2.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/kernels.h"
#include "parallel.h"
#include "run_block.h"

namespace fxprune {

// Blocks of pixels that a pair is cut in, a multiple of the threads: as many as keep the value
// between in L2, unless too little is left of one. Below 2, the two run one after the other.
inline int64_t product_blocks(const TileGemm& first, int64_t pool) {
  constexpr int64_t kBlock = 128 * 1024;  // floats of the value between
  constexpr int64_t kLeastVecs = 6;
  const int64_t width = kernels().width, most = (first.m + width - 1) / width / kLeastVecs;
  const int64_t fit = (first.n * first.m + kBlock - 1) / kBlock;
  return std::min((fit + pool - 1) / pool, most / pool) * pool;
}

// One image; features of both lie side by side, neither has a gate, the first no residual.
inline void run_products(const TileGemm& first, const TileGemm& second, int64_t blocks,
                         int64_t pool) {
  const Kernels& k = kernels();
  const int64_t vecs = (first.m + k.width - 1) / k.width;
  for_each_unit(blocks, pool, [&](int64_t block) {
    const TileSpan span = {0, vecs * block / blocks, vecs * (block + 1) / blocks, 0, first.tiles};
    const PixelRange pixels = {span.begin * k.width, std::min(span.end * k.width, first.m)};
    const int64_t count = pixels.end - pixels.begin;
    const PartPlanes planes(scratch<1>(first.n * (count + 16)), 0, pixels);
    TileGemm wide = first;
    wide.out = planes.moved;
    wide.out_gap = planes.pitch - first.m;
    k.tile_gemm_feature_major(wide, span, nullptr);
    run_product_of(second, planes, pixels);
  });
}

}  // namespace fxprune
