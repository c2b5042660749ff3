// Runs a prepared tile-wise convolution on the thread pool: the layout of its input, and how its
// work is cut. Nothing that decides a result depends on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "caches.h"
#include "fxprune/kernels.h"
#include "geometry_cache.h"
#include "parallel.h"
#include "run.h"

namespace fxprune {

// How one axis is cut into planes (see tile_conv.h). Tap t reads plane[t] from shift[t] on.
struct ConvAxis {
  std::vector<int64_t> begin, plane, shift;

  // One plane per phase of the stride that a tap needs; with `own`, one per tap, whose rows then
  // need no positions beyond those of the result.
  ConvAxis(int64_t taps, int64_t stride, int64_t padding, int64_t dilation, bool own) {
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t at = t * dilation, phase = own ? at : at % stride;
      const auto found = std::find(begin.begin(), begin.end(), phase - padding);
      plane.push_back(found - begin.begin());
      shift.push_back(own ? 0 : at / stride);
      if (found == begin.end()) begin.push_back(phase - padding);
    }
  }
  int64_t reach() const { return *std::max_element(shift.begin(), shift.end()); }
};

// The layout of a convolution's copy, from its sizes: those of `a` that no tensor's contents fill.
class ConvTables {
 public:
  template <class T>
  explicit ConvTables(TileConvOf<T>* a)
      : rows_(a->kernel_h, a->stride_h, a->pad_h, a->dilation_h, false),
        columns_(a->kernel_w, a->stride_w, a->pad_w, a->dilation_w, own_planes(*a)) {
    a->row_planes = static_cast<int64_t>(rows_.begin.size());
    a->column_planes = static_cast<int64_t>(columns_.begin.size());
    a->row_begin = rows_.begin.data();
    a->column_begin = columns_.begin.data();
    // A row's right padding is the next row's left padding, and the last row's is the gap.
    a->pitch = own_planes(*a)
                   ? a->out_w
                   : std::max(a->out_w, (a->width + a->pad_w + a->stride_w - 1) / a->stride_w);
    a->gap = own_planes(*a) ? 0 : (a->pad_w + a->stride_w - 1) / a->stride_w;
    const int64_t reach = rows_.reach(),
                  row = a->channels * a->row_planes * a->column_planes * a->pitch;
    // Rows that fit; of a small image more of them, because each band reads all weights anew.
    const int64_t size = sizeof(T),
                  near = of_l2(kNearCopy) / size / std::max<int64_t>(row, 1) - reach,
                  far = of_l2(kCopy) / size / std::max<int64_t>(row, 1) - reach;
    const int64_t least = std::min<int64_t>(far, kBandPixels / std::max<int64_t>(a->pitch, 1));
    const int64_t fit = std::clamp<int64_t>(std::max(near, least), 1, a->out_h);
    a->bands = (a->out_h + fit - 1) / fit;
    if (a->bands > 1) a->bands = std::min(a->out_h, (a->bands + 1) / 2 * 2);
    a->band_rows = (a->out_h + a->bands - 1) / a->bands;
    a->bands = (a->out_h + a->band_rows - 1) / a->band_rows;
    a->plane_rows = a->band_rows + reach;
    const double numbers =
        double(row) * double(a->plane_rows) + double(a->gap) * double(a->channels);
    fits_ = numbers < double(1 << 30);
    if (!fits_) return;
    if (a->stride_w <= 2) fill_masks(a);
    table_.reserve(a->k);
    for (int64_t c = 0; c < a->group_channels(); ++c) {
      for (int64_t r = 0; r < a->kernel_h; ++r) {
        for (int64_t s = 0; s < a->kernel_w; ++s) {
          const int64_t plane =
              (c * a->row_planes + rows_.plane[r]) * a->column_planes + columns_.plane[s];
          table_.push_back(static_cast<int32_t>(plane * a->plane_size() +
                                                rows_.shift[r] * a->pitch + columns_.shift[s]));
        }
      }
    }
    a->table = table_.data();
    fill_lanes(a, a->out_w);
    layout_ = *a;
  }
  void attach(ConvLayout* a) const { *a = layout_; }
  // False when a copy of the rows that one output row reads is too large.
  bool fits() const { return fits_; }

 private:
  template <class Conv>
  void fill_masks(Conv* a) {
    const int64_t width = kernels().width, vecs = (a->pitch + width - 1) / width,
                  lanes = width * a->stride_w;
    masks_.resize(a->column_planes * vecs);
    for (int64_t s = 0; s < a->column_planes; ++s) {
      const int64_t most = a->pitch * a->stride_w,
                    left = std::clamp<int64_t>(-columns_.begin[s], 0, most);
      set_mask_bits(masks_.data() + s * vecs, lanes, left,
                    std::clamp<int64_t>(a->width - columns_.begin[s], left, most));
    }
    a->masks = masks_.data();
  }

  void fill_lanes(ConvLayout* a, int64_t out_w) {
    const int64_t width = kernels().width;
    lanes_.resize((a->band_rows * a->pitch + width - 1) / width);
    int64_t x = 0, to = 0;  // column and pixel of a lane
    for (PixelLanes& lanes : lanes_) {
      lanes = {0, static_cast<int32_t>(to)};
      for (int64_t lane = 0; lane < width; ++lane) {
        if (x < out_w) lanes.bits |= 1u << lane, ++to;
        if (++x == a->pitch) x = 0;
      }
    }
    a->lanes = lanes_.data();
  }

  // Bytes of a band's copy: so that most of it stays in the nearest caches, and so that it stays
  // in L2 beside the weights. Pixels of a band that are worth the second.
  static constexpr int64_t kNearCopy = 128 * 1024, kCopy = 512 * 1024, kBandPixels = 192;
  // Small images: positions between rows would be a large part of all. Few channels under a stride
  // (a network's first convolution): the copy is small beside the products, and without those
  // positions vectors lie where cache lines do.
  template <class Conv>
  static bool own_planes(const Conv& a) {
    const bool few = a.stride_w > 1 && a.channels <= 4 && a.out_w % kernels().width == 0;
    return a.kernel_w > 1 && (a.out_w <= 8 || few);
  }

  ConvAxis rows_, columns_;
  std::vector<int32_t> table_;
  std::vector<uint32_t> masks_;
  std::vector<PixelLanes> lanes_;
  bool fits_;
  ConvLayout layout_{};
};

// Fills the arguments' layout, which points into the tables; they must outlive the run.
template <class T>
std::shared_ptr<const ConvTables> conv_tables(TileConvOf<T>* a) {
  static GeometryCache<ConvTables> cache;
  const auto tables = cache.get(
      {kernels().width, a->channels, a->height, a->width, a->groups, a->kernel_h, a->kernel_w,
       a->stride_h, a->stride_w, a->pad_h, a->pad_w, a->dilation_h, a->dilation_w},
      [&] { return std::make_shared<ConvTables>(a); });
  tables->attach(a);
  return tables;
}

// What this thread's copy holds.
struct HeldBand {
  int64_t call = 0, image = 0, band = 0, begin = 0, end = 0;
  bool covers(const HeldBand& b) const {
    return call == b.call && image == b.image && band == b.band && begin <= b.begin && b.end <= end;
  }
};

// Copies channels [begin, end) of a band, and computes the tiles of a span from them.
inline void copy_band(const TileConv& a, const ConvSpan& span, int64_t begin, int64_t end,
                      float* copy) {
  kernels().conv_planes(a, span, begin, end, copy);
}
inline void copy_band(const TileConvBf16& a, const ConvSpan& span, int64_t begin, int64_t end,
                      Bf16* copy) {
  kernels().bf16.conv_planes_bf16(a, span, begin, end, copy);
}
inline void compute_band(const TileConv& a, const ConvSpan& span, const float* copy) {
  kernels().tile_conv(a, span, copy);
}
inline void compute_band(const TileConvBf16& a, const ConvSpan& span, const Bf16* copy) {
  const Bf16Kernels& k = kernels().bf16;
  k.tile_conv_bf16(a, span, copy, scratch<1>(k.bf16_scratch(a, 0)));
}

// Numbers of a copy, and what whole vectors or blocks touch behind the last plane.
template <class Conv>
int64_t copy_size(const Conv& a) {
  return a.channels * a.channel_size() + std::max<int64_t>(2 * kernels().width, 2 * kPixels);
}

template <class T>
void run_tile_conv(const TileConvOf<T>& a, int64_t pool) {
  static std::atomic<int64_t> calls{0};
  const int64_t call = ++calls, bands = a.batch * a.bands;
  int64_t parts = weight_parts(a);
  if (pool > 1 && bands < 4 * pool)
    parts = std::clamp((4 * pool + bands - 1) / bands, parts, std::max<int64_t>(a.tiles, 1));
  for_each_unit(bands * parts, pool, [&](int64_t unit) {
    static thread_local HeldBand held;
    const int64_t part = unit % parts, image = unit / parts / a.bands,
                  band = unit / parts % a.bands;
    const ConvSpan span = {image, band * a.band_rows, a.rows_of(band), tile_cut(a, part, parts),
                           tile_cut(a, part + 1, parts)};
    HeldBand need = {call, image, band, 0, 0};
    if (span.tile_begin < span.tile_end) {
      need.begin = a.group_of(span.tile_begin) * a.group_channels();
      need.end = (a.group_of(span.tile_end - 1) + 1) * a.group_channels();
    }
    T* copy = scratch_of<0, T>(copy_size(a));
    if (!held.covers(need)) {
      copy_band(a, span, need.begin, need.end, copy);
      held = need;
    }
    compute_band(a, span, copy);
  });
}

}  // namespace fxprune
