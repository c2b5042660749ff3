// Tile-wise convolution: the GEMM strips over the copy of a band (conv_planes.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "fxprune/conv_planes.h"
#include "fxprune/tile_conv.h"
#include "fxprune/tile_gemm_feature_major.h"

namespace fxprune {

template <class V>
void tile_conv(const TileConv& a, const ConvSpan& span, const float* copy) {
  using M = FeatureMajor<V>;
  static constexpr auto kEdges = M::template edges<Source::kTaps>();
  const float* values = a.values + a.tile_ptr[span.tile_begin] * a.granularity;
  const TileSpan tiles = {span.image, 0, 0, span.tile_begin, span.tile_end};
  const int64_t start = span.row * a.out_w, rows = span.rows;
  const int64_t length = (rows - 1) * a.pitch + a.out_w;
  const int64_t group_size = a.group_channels() * a.channel_size(), group_features = a.n / a.groups;

  // The last pixels are edge pixels where they are one run of the result.
  int64_t edge = M::edge_pixels(length, a.granularity);
  if (edge > a.out_w) edge = 0;
  const int64_t vecs = (length - edge + M::kW - 1) / M::kW,
                blocks = (vecs + M::kVecs - 1) / M::kVecs;

  // A strip from position `at` of the band on; its results are counted from pixel `to`.
  const auto strip_at = [&](int64_t at, int64_t to, int64_t count) {
    auto s = M::strip_at(a, span.image, start + to, count);
    s.x = copy + at;
    s.table = a.table;
    return s;
  };
  const auto each = [&](typename M::Strip& s, const auto& f) {
    const float* x = s.x;
    M::each_strip(a, tiles, values, s, [&](typename M::Strip& strip, int features) {
      if (a.groups == 1) return f(strip, features);
      auto moved = strip;
      moved.x = x + strip.columns[0] / group_features * group_size;
      f(moved, features);
    });
  };

  RowsAhead<float> ahead(a, span);
  int64_t first = 0;  // vector
  for (int64_t b = 0; b < blocks; ++b) {
    const int here = static_cast<int>(vecs / blocks + (b < vecs % blocks));
    PixelLanes lanes[M::kVecs];
    std::copy_n(a.lanes + first, here, lanes);
    auto s = strip_at(first * M::kW, 0, 0);
    s.lanes = lanes;
    s.tail = std::min<int64_t>(M::kW, length - edge - (first + here - 1) * M::kW);
    lanes[here - 1].bits &= (1u << s.tail) - 1;  // what follows is no row of this band
    each(s, [&](typename M::Strip& strip, int features) {
      strip.ahead = ahead.take(strip.k);
      M::template kernel<Source::kTaps>(features, here)(strip);
    });
    first += here;
  }
  M::finish(a, tiles, start, start + rows * a.out_w - edge);
  if (edge > 0) {
    auto s = strip_at(length - edge, rows * a.out_w - edge, edge);
    each(s,
         [&](const typename M::Strip& strip, int features) { kEdges[edge - 1](strip, features); });
  }
}

}  // namespace fxprune
