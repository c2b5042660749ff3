// Arguments of the tile-wise convolution, an implicit GEMM, and where it finds its input.
//
//   out[n, oy, ox] = act(sum over kept k = (c, r, s) of values[k, n] * x[c, oy*sh + r*dh - ph,
//                        ox*sw + s*dw - pw] + bias[n] + residual[n, oy, ox])
//
// Output rows are computed in bands. A thread copies the input rows of a band into planes, one per
// phase of the stride, padded: then position (oy, ox) of the band lies at oy*pitch + ox in every
// plane, each (r, s) is a constant offset from there, and vectors run over the flattened band. The
// few positions between two rows (ox >= out_w) are computed and dropped.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/tile_gemm.h"

namespace fxprune {

// The layout of a band's copy, (channels, row planes, column planes, plane_rows, pitch), with a gap
// of zeros behind each plane. Position i of a plane holds input row (or column) begin + i * stride
// of its axis.
struct ConvLayout {
  int64_t bands, band_rows, row_planes, column_planes, plane_rows, pitch, gap;
  const int64_t *row_begin, *column_begin;  // per plane
  const uint32_t*
      masks;             // per plane and vector of a row: the input lanes on the image; stride <= 2
  const int32_t* table;  // (k): offset of each (c, r, s) in the copy
  const PixelLanes* lanes;  // per vector of a band's positions; `to` counts from its first pixel
};

// The GEMM part holds: m = out_h * out_w, k = channels / groups * kernel_h * kernel_w, n, the
// packed weight and its epilogue. Every tile lies inside one group, and its index counts that
// group's k.
template <class T>
struct TileConvOf : TileGemmOf<T>, ConvLayout {
  int64_t channels, height, width, groups, out_h, out_w;
  int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  int64_t group_channels() const { return channels / groups; }
  int64_t plane_size() const { return plane_rows * pitch + gap; }
  int64_t channel_size() const { return row_planes * column_planes * plane_size(); }
  int64_t group_of(int64_t tile) const {
    return this->columns[tile * this->granularity] / (this->n / groups);
  }
  int64_t rows_of(int64_t band) const { return std::min(band_rows, out_h - band * band_rows); }
};

using TileConv = TileConvOf<float>;
using TileConvBf16 = TileConvOf<Bf16>;

// One unit of work: output rows [row, row + rows) of one image, at most band_rows of them, for
// tiles [tile_begin, tile_end).
struct ConvSpan {
  int64_t image, row, rows, tile_begin, tile_end;
};

}  // namespace fxprune
