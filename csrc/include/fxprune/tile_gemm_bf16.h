// Tile-wise GEMM in bfloat16 with sums in float: what both layouts of the activations and the
// convolution share.
//
//   pairs[k'][32]  = k' of the tile's rows of a block of 32 pixels, two and two   for L1
//                    interleaved
//   sums[G][32]   += the tile's weights times the pairs, two strips at once       PairProducts
//   out            = act(sums + bias + residual), rounded
//
// Pruned rows cost nothing, kept ones a copy that the products amortise over the tile's width, so
// wide tiles are fast. The order of a sum follows from the tile's index list alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/math.h"
#include "fxprune/pair_products.h"
#include "fxprune/tile_image.h"
#include "fxprune/unroll.h"

namespace fxprune {

template <class V>
struct TileBf16 {
  using Reg = typename V::Reg;
  static constexpr int kW = V::kWidth;
  static constexpr int64_t kMost = 32;  // output features that are stored at once
  static constexpr int64_t kChunk = 4;  // blocks of input features whose pairs stay in L1
  static constexpr int64_t kSquare = kMost * kPixels;

  // Parts of the scratch (bf16_scratch).
  struct Room {
    Bf16 *panels, *pairs;
    float *sums, *square;
  };

  // Floats of the sums of a tile.
  static int64_t sums_size(const TileShape& a) {
    return std::max(image_rows(a.granularity), kMost) * kPixels;
  }

  static Room room(const TileShape& a, float* scratch) {
    Room r;
    r.square = scratch;
    r.sums = r.square + 2 * kSquare;
    r.pairs = reinterpret_cast<Bf16*>(r.sums + 2 * sums_size(a));
    r.panels = r.pairs + kChunk * kDeep * kPixels;
    return r;
  }

  // Pairs of the rows index[0 .. count), padded to whole blocks. at(k): row k, 32 numbers of it.
  // lanes: those that may be read; what comes of the others is dropped.
  template <class At>
  static void gather(const int32_t* index, int64_t count, int64_t lanes, const At& at,
                     Bf16* pairs) {
    alignas(64) static constexpr Bf16 kNothing[kPixels] = {};
    const int64_t end = (count + kDeep - 1) / kDeep * kDeep;
    int64_t i = 0;
    if (lanes >= kPixels) {
      for (; i + 1 < count; i += 2)
        V::interleave(at(index[i]), at(index[i + 1]), pairs + i * kPixels);
    } else {
      for (; i + 1 < count; i += 2)
        V::interleave(at(index[i]), at(index[i + 1]), lanes, pairs + i * kPixels);
    }
    if (i < count) {
      V::interleave(at(index[i]), kNothing, lanes, pairs + i * kPixels);
      i += 2;
    }
    for (; i < end; i += 2) V::interleave(kNothing, kNothing, pairs + i * kPixels);
  }

  // A span of blocks, `group` of them at a time: every tile passes over these.
  //   source.hold(begin, end)       is called ahead of a group
  //   source.gather(tile, block, index, count, pairs)
  //   output.halves(block)          of the block that hold pixels: 1 or 2
  //   output.ask(block, columns, features, from)   asks for the memory of a result ahead of the
  //                                                products
  //   output.store(block, columns, features, from, to, sums)   completes output features [from,
  //                                                to), of which `columns` were computed
  template <class Source, class Output>
  static void run(const TileGemmBf16& a, const TileSpan& span, int64_t group, const Room& room,
                  Source& source, Output& output) {
    const Bf16* image = a.values + image_offset(a, span.tile_begin);
    PairProducts<V> products;
    for (int64_t begin = span.begin; begin < span.end; begin += group) {
      const int64_t end = std::min(begin + group, span.end);
      source.hold(begin, end);
      output.hold(begin, end);
      tiles(a, span, image, begin, end, room, products, source, output);
    }
  }

  // Sums that are complete, of a part of a tile, and what becomes of them.
  struct Done {
    int64_t block, features, from, to;
    const int32_t* columns;
    float* sums;
  };

  // A result is stored while the next products are under way: the matrix unit works beside the
  // core, so sums have two places.
  template <class Source, class Output>
  static void tiles(const TileGemmBf16& a, const TileSpan& span, const Bf16* image, int64_t begin,
                    int64_t end, const Room& room, PairProducts<V>& products, const Source& source,
                    const Output& output) {
    const int64_t stop = a.features_to(span.tile_end), half = sums_size(a);
    int64_t from = a.features_from(span.tile_begin), place = 0;
    Done done;
    bool pending = false;
    const auto store = [&] {
      if (pending)
        output.store(done.block, done.columns, done.features, done.from, done.to, done.sums);
      pending = false;
    };
    for (int64_t t = span.tile_begin; t < span.tile_end; ++t) {
      const int64_t start = a.tile_ptr[t], width = a.width(t), depth = image_depth(a, t);
      const int64_t strip = strip_rows(width), padded = image_rows(width);
      const int32_t* columns = a.columns + t * a.granularity;
      const int64_t count = a.tile_ptr[t + 1] - start, stride = depth * strip * kDeep;
      int64_t next = from;
      for (int64_t b = begin; b < end; ++b) {
        const int64_t halves = output.halves(b);
        next = from;
        for (int64_t d = 0; d == 0 || d < depth; d += kChunk) {
          const int64_t deep = std::min(kChunk, depth - d), first = d * kDeep;
          source.gather(t, b, a.index + start + first, std::min(deep * kDeep, count - first),
                        room.pairs);
          for (int64_t f = 0; f < padded; f += 2 * strip) {
            const int64_t strips = std::min<int64_t>(2, (padded - f) / strip);
            const int64_t features = std::min(width - f, strips * strip);
            const bool last = f + features == width && t + 1 == span.tile_end;
            const int64_t to = last ? stop : columns[f + features];
            float* sums = room.sums + place * half + f * kPixels;
            const bool complete = d + kChunk >= depth;
            if (complete) output.ask(b, columns + f, features, next);
            products.run(image + f * depth * kDeep + d * strip * kDeep, stride, deep, strip, strips,
                         room.pairs, halves, d > 0, sums);
            if (!complete) continue;
            store();
            done = {b, features, next, to, columns + f, sums};
            pending = true;
            next = to;
          }
        }
        place = 1 - place;
      }
      from = next;
      image += padded * depth * kDeep;
    }
    store();
    for (int64_t b = begin; b < end && from < stop; ++b)
      output.store(b, a.columns, 0, from, stop, room.sums);
  }
};

// Panels of a group of blocks: the activations of each, (k, 32), filled by pack(block, panel).
// They are read once, and lie side by side for every tile that passes over them.
template <class V, class Pack>
struct Panels {
  const TileGemmBf16& a;
  Bf16* panels;
  const Pack& pack;
  int64_t begin = 0;

  void hold(int64_t first, int64_t end) {
    begin = first;
    for (int64_t b = first; b < end; ++b) pack(b, panels + (b - first) * a.k * kPixels);
  }
  void gather(int64_t, int64_t block, const int32_t* index, int64_t count, Bf16* pairs) const {
    const Bf16* panel = panels + (block - begin) * a.k * kPixels;
    const auto at = [=](int32_t k) { return panel + k * kPixels; };
    TileBf16<V>::gather(index, count, kPixels, at, pairs);
  }
};

// Floats of scratch that a unit of `blocks` blocks needs; without blocks, one that has no panels.
template <class V>
int64_t bf16_scratch(const TileShape& a, int64_t blocks) {
  using M = TileBf16<V>;
  const int64_t pairs = M::kChunk * kDeep * kPixels,
                panels = (std::min(blocks, bf16_group(a)) * a.k + kDeep) * kPixels;
  return 2 * (M::kSquare + M::sums_size(a)) + (pairs + panels) / 2;
}

}  // namespace fxprune
