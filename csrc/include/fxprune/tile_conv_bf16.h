// Tile-wise convolution in bfloat16: products over blocks of 32 positions of a band's copy
// (conv_planes.h), whose kept rows are gathered from the planes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/conv_planes.h"
#include "fxprune/tile_conv.h"
#include "fxprune/tile_gemm_bf16_feature_major.h"

namespace fxprune {

// Kept rows of a band's copy; positions are counted from its first.
template <class V>
struct ConvRows {
  const TileConvBf16& a;
  const Bf16* copy;

  void hold(int64_t, int64_t) {}
  void gather(int64_t tile, int64_t block, const int32_t* index, int64_t count, Bf16* pairs) const {
    const int64_t group = a.groups == 1 ? 0 : a.group_of(tile);
    const Bf16* from = copy + group * a.group_channels() * a.channel_size() + block * kPixels;
    const int32_t* table = a.table;
    const auto at = [=](int32_t k) { return from + table[k]; };
    TileBf16<V>::gather(index, count, kPixels, at, pairs);
  }
};

// Results of a band: positions between two of its rows are dropped.
template <class V>
struct ConvOutput {
  static constexpr int64_t kGroup = 16;  // blocks whose lanes are known at once
  const TileConvBf16& a;
  const ConvSpan& span;
  float* line;
  RowsAhead<Bf16>& ahead;
  int64_t begin = 0;
  BlockLanes lanes[kGroup];

  ConvOutput(const TileConvBf16& conv, const ConvSpan& part, float* room, RowsAhead<Bf16>& rows)
      : a(conv), span(part), line(room), ahead(rows) {}
  int64_t length() const { return (span.rows - 1) * a.pitch + a.out_w; }
  int64_t halves(int64_t block) const { return PixelsBf16<V>::halves(length() - block * kPixels); }
  void hold(int64_t first, int64_t end) {
    begin = first;
    for (int64_t b = first; b < end; ++b) {
      BlockLanes& here = lanes[b - first];
      here.count = 0;
      const int64_t from = b * kPixels, to = std::min(from + kPixels, length());
      for (int64_t row = from / a.pitch; row * a.pitch < to; ++row) {
        const int64_t start = std::max(from, row * a.pitch),
                      stop = std::min(to, row * a.pitch + a.out_w);
        if (start >= stop) continue;
        const int64_t pixel = (span.row + row) * a.out_w + start - row * a.pitch;
        // Runs without a position between them are one.
        if (here.count > 0 && a.pitch == a.out_w) {
          here.runs[here.count - 1].lanes |=
              static_cast<uint32_t>((uint64_t{1} << (stop - from)) - 1);
        } else {
          here.add(pixel - (start - from), start - from, stop - from);
        }
      }
    }
  }
  void ask(int64_t, const int32_t*, int64_t, int64_t) const {
    constexpr int64_t kLines = 12;  // while a block is under way
    const char* next = ahead.take(kLines);
    for (int64_t i = 0; i < kLines && next; ++i)
      __builtin_prefetch(next + i * RowsAhead<Bf16>::kLine, 0, 2);
  }
  void store(int64_t block, const int32_t* columns, int64_t features, int64_t from, int64_t to,
             float* sums) const {
    PixelsBf16<V>::store(a, span.image, lanes[block - begin], columns, features, from, to, sums,
                         line);
  }
};

template <class V>
void tile_conv_bf16(const TileConvBf16& a, const ConvSpan& span, const Bf16* copy, float* scratch) {
  using M = PixelsBf16<V>;
  const auto room = M::room(a, scratch);
  ConvRows<V> source{a, copy};
  RowsAhead<Bf16> ahead(a, span);
  ConvOutput<V> output(a, span, room.square, ahead);
  const int64_t blocks = (output.length() + kPixels - 1) / kPixels;
  M::run(a, {span.image, 0, blocks, span.tile_begin, span.tile_end}, ConvOutput<V>::kGroup, room,
         source, output);
}

}  // namespace fxprune
