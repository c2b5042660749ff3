// Runs a block of a network, [1x1 or larger convolution ->] depthwise -> 1x1 convolution, band by
// band of the last one's pixels: what lies between stays in the caches of the core that computes
// it, and cores meet once a block.
//
// Neighbouring bands both compute the rows between them. One image.
#pragma once

#include <algorithm>
#include <cstdint>

#include "caches.h"
#include "fxprune/kernels.h"
#include "parallel.h"
#include "run.h"
#include "run_conv.h"
#include "run_products.h"

namespace fxprune {

// `expand` or `conv` feeds the depthwise convolution; `project`, where there is one, reads it.
struct FusedBlock {
  const TileGemm* expand;
  const TileConv* conv;
  DepthwiseTaps depthwise;
  const TileGemm* project;

  const TileGemm& first() const { return expand ? *expand : *conv; }
};

// Bands that a block is cut in: as many as keep one's values in L2, a multiple of the threads. 0
// where too little is left of one beside the rows computed twice.
inline int64_t block_bands(const FusedBlock& b, int64_t pool) {
  const int64_t room = of_l2(160 * 1024);  // floats of the values inside a band
  constexpr int64_t kLeastVecs = 12, kLeastRows = 7;
  const DepthwiseTaps& d = b.depthwise;
  const int64_t width = kernels().width, length = band_length(d, width);
  const int64_t values = d.channels * (d.out_h * d.out_w + (b.conv ? d.height * d.width : 0));
  const int64_t most = length / (d.flat(width) ? kLeastVecs : kLeastRows);
  const int64_t fit = (values + room - 1) / room;
  if (pool == 1) return std::max<int64_t>(1, std::min(fit, most));
  return std::min((fit + pool - 1) / pool, most / pool) * pool;
}

// Output rows [begin, end) of a convolution into `to`, piece by piece of what its copy holds.
inline void run_conv_rows(const TileConv& conv, int64_t begin, int64_t end,
                          const PartPlanes<float>& to) {
  const Kernels& k = kernels();
  TileConv a = conv;
  a.out = to.moved;
  a.out_gap = to.pitch - a.m;
  float* copy = scratch(copy_size(a));
  for (int64_t row = begin; row < end; row += a.band_rows) {
    const ConvSpan span = {0, row, std::min(a.band_rows, end - row), 0, a.tiles};
    k.conv_planes(a, span, 0, a.channels, copy);
    k.tile_conv(a, span, copy);
  }
}

// One band of the depthwise convolution and what feeds it; results go to d.out.
inline void run_depthwise_band(const FusedBlock& b, const DepthwiseTaps& d, int64_t begin,
                               int64_t end) {
  constexpr int64_t kNearest = 8 * 1024;  // floats of expanded tiles that stay beside each other
  const Kernels& k = kernels();
  const int64_t width = k.width;
  const PixelRange read = band_input(d, width, begin, end);
  const TileGemm& first = b.first();
  const PixelRange held = {read.begin / width * width, (read.end + width - 1) / width * width};
  const int64_t pixels = held.end - held.begin, tile_size = first.granularity * pixels;
  const int64_t fit = std::max<int64_t>(1, kNearest / std::max<int64_t>(tile_size, 1)),
                each = b.conv ? first.tiles : fit;
  for (int64_t tile = 0; tile < first.tiles; tile += each) {
    const int64_t last = std::min(tile + each, first.tiles);
    const int64_t from = first.features_from(tile), to = first.features_to(last);
    const auto planes = PartPlanes<float>::of<2>(from, to, held);
    if (b.conv) {
      run_conv_rows(*b.conv, read.begin / d.width, read.end / d.width, planes);
    } else {
      TileGemm expand = first;
      expand.out = planes.moved;
      expand.out_gap = planes.pitch - first.m;
      k.tile_gemm_feature_major(expand, {0, held.begin / width, held.end / width, tile, last},
                                nullptr);
    }
    DepthwiseTaps taps = d;
    taps.x = planes.moved;
    taps.x_gap = planes.pitch - d.height * d.width;
    k.depthwise_taps(taps, {from, to, begin, end});
  }
}

// Bands of a depthwise convolution and, where there is one, of the 1x1 convolution that reads it.
// run_band(taps, begin, end): one band, into taps.out, of what feeds it and itself.
template <class T, class Band>
void run_bands(const DepthwiseTapsOf<T>& d, const TileGemmOf<T>* project, int64_t bands,
               int64_t pool, const Band& run_band) {
  const int64_t width = depthwise_width(d, d.x), length = band_length(d, width),
                size = d.out_h * d.out_w, line = d.flat(width) ? width : d.out_w;
  for_each_unit(bands, pool, [&](int64_t band) {
    const int64_t begin = length * band / bands, end = length * (band + 1) / bands;
    if (project == nullptr) return run_band(d, begin, end);
    const PixelRange pixels = {begin * line, std::min(end * line, size)};
    const auto planes = PartPlanes<T>::template of<3>(0, d.channels, pixels);
    DepthwiseTapsOf<T> taps = d;
    taps.out = planes.moved;
    taps.out_gap = planes.pitch - size;
    run_band(taps, begin, end);
    run_product_of(*project, planes, pixels);
  });
}

inline void run_block(const FusedBlock& b, int64_t bands, int64_t pool) {
  run_bands(b.depthwise, b.project, bands, pool,
            [&](const DepthwiseTaps& taps, int64_t begin, int64_t end) {
              run_depthwise_band(b, taps, begin, end);
            });
}

}  // namespace fxprune
