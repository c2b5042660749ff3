// Tile-wise convolution: the copy of a band into planes, and the GEMM strips over it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>

#include "fxprune/tile_conv.h"
#include "fxprune/tile_gemm_feature_major.h"

namespace fxprune {

template <class V>
struct ConvPlanes {
  static constexpr int64_t kW = V::kWidth;

  // One row of a plane: lanes off the image are off in the masks. Writes whole vectors; what lies
  // beyond the row is the next row's and written later.
  template <int Stride>
  static void copy_row(const float* x, const uint32_t* masks, int64_t vecs, float* to) {
    for (int64_t v = 0; v < vecs; ++v, x += Stride * kW) {
      V::store(to + v * kW,
               Stride == 1 ? V::load(x, V::bits(masks[v])) : V::load_even(x, masks[v]));
    }
  }

  static void copy_row(const TileConv& a, const float* x, int64_t begin, float* to) {
    for (int64_t i = 0; i < a.pitch; ++i) {
      const int64_t at = begin + i * a.stride_w;
      to[i] = at >= 0 && at < a.width ? x[at] : 0.0f;
    }
  }

  static void clear(float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kW) V::store(to + i, V::zero());
  }
};

// Fills channels [begin, end) of a band's copy, which has room for two vectors behind the last.
template <class V>
void conv_planes(const TileConv& a, const ConvSpan& span, int64_t begin, int64_t end, float* copy) {
  using P = ConvPlanes<V>;
  const int64_t first = span.row * a.stride_h, vecs = (a.pitch + P::kW - 1) / P::kW;
  float* to = copy + begin * a.channel_size();
  for (int64_t c = begin; c < end; ++c) {
    const float* image = a.x + (span.image * a.channels + c) * a.height * a.width;
    for (int64_t r = 0; r < a.row_planes; ++r) {
      for (int64_t s = 0; s < a.column_planes; ++s) {
        const int64_t left = a.column_begin[s];
        const uint32_t* masks = a.masks + s * vecs;
        for (int64_t i = 0; i < a.plane_rows; ++i, to += a.pitch) {
          const int64_t y = first + a.row_begin[r] + i * a.stride_h;
          const float* row = image + y * a.width;
          if (y < 0 || y >= a.height) {
            P::clear(to, a.pitch);
          } else if (a.stride_w == 1) {
            P::template copy_row<1>(row + left, masks, vecs, to);
          } else if (a.stride_w == 2) {
            P::template copy_row<2>(row + left, masks, vecs, to);
          } else {
            P::copy_row(a, row, left, to);
          }
        }
        P::clear(to, a.gap);
        to += a.gap;
      }
    }
  }
}

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
    M::each_strip(a, tiles, values, s, [&](const typename M::Strip& strip, int features) {
      if (a.groups == 1) return f(strip, features);
      auto moved = strip;
      moved.x = x + strip.columns[0] / group_features * group_size;
      f(moved, features);
    });
  };

  int64_t first = 0;  // vector
  for (int64_t b = 0; b < blocks; ++b) {
    const int here = static_cast<int>(vecs / blocks + (b < vecs % blocks));
    PixelLanes lanes[M::kVecs];
    std::copy_n(a.lanes + first, here, lanes);
    auto s = strip_at(first * M::kW, 0, 0);
    s.lanes = lanes;
    s.tail = std::min<int64_t>(M::kW, length - edge - (first + here - 1) * M::kW);
    lanes[here - 1].bits &= (1u << s.tail) - 1;  // what follows is no row of this band
    each(s, [&](const typename M::Strip& strip, int features) {
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
