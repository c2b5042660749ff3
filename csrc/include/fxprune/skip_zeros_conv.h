// The kernel of fxprune::skip_zeros_conv: the lists of fxprune::skip_zeros_mm, shifted by the
// window.
//
//   list[p]          = non-zeros of pixel p among kSkipPart channels, once for all of K and (r, s)
//
//   panel[c][kBlock] = those channels' rows of w at a place (r, s), once for all pixels of a band
//
//   out[q][kBlock]  += value * panel[channel], q = p shifted by (r, s)
//
// Every sum is taken in the order of the parts, of the window, of the channels, however the work is
// cut. Include only under a target pragma.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fxprune/skip_zeros_rows.h"

namespace fxprune {

template <class V>
struct SkipConvKernel {
  using Rows = SkipKernel<V>;
  static constexpr int64_t kBlock = Rows::kBlock;

  const SkipConv& a;
  const SkipBand& band;
  const SkipRows rows;
  const Rows in, out;

  // Pixels from the first of a band's first sample on.
  static Rows pixels(const SkipZeros& z, const SkipBand& band, int64_t first, int64_t last,
                     int64_t width, float* scratch) {
    return Rows(z, band.first_sample * z.positions + first * width,
                (band.last_sample - 1) * z.positions + last * width, scratch);
  }

  SkipConvKernel(const SkipConv& a_in, const SkipBand& band_in, float* scratch)
      : a(a_in),
        band(band_in),
        rows(a, band),
        in(pixels(a.x, band, rows.first, rows.last, a.in_w, scratch)),
        out(pixels(a.out, band, band.first, band.last, a.w_out,
                   scratch + skip_scratch(a.x, in.last_row - in.first_row, V::kWidth))) {}

  void run() const {
    const int64_t places = a.r * a.s;
    std::fill_n(out.results, (out.last_row - out.first_row) * out.pitch(), 0.0f);
    for (int64_t c = 0; c < a.x.n; c += kSkipPart) {
      const int64_t channels = std::min(kSkipPart, a.x.n - c);
      in.list(c, channels);
      for (int64_t k = 0; k < a.x.k; k += kBlock) {
        const int64_t width = std::min(kBlock, a.x.k - k);
        const int64_t vecs = (width + V::kWidth - 1) / V::kWidth;
        const int64_t lanes = width - (vecs - 1) * V::kWidth;
        for (int64_t place = 0; place < places; ++place) {
          in.load_panel(a.w + (c * places + place) * a.x.k + k, places * a.x.k, channels, vecs,
                        lanes);
          shifted(place / a.s, place % a.s, k, vecs, lanes);
        }
      }
    }
    if (!a.x.row_major) out.store_positions();
  }

  // Adds what the place (r, s) of the window gives.
  void shifted(int64_t r, int64_t s, int64_t k, int64_t vecs, int64_t lanes) const {
    static constexpr auto kKernels = Rows::table(std::make_integer_sequence<int, Rows::kVecs>());
    const auto kernel = kKernels[vecs - 1];
    const int64_t down = a.pad_h - r, right = a.pad_w - s;
    const int64_t first = std::max<int64_t>(0, -right);
    const int64_t last = std::min(a.w_out, a.in_w - right);
    const int64_t read = rows.last - rows.first, written = band.last - band.first;
    for (int64_t sample = 0; sample < band.samples(); ++sample) {
      for (int64_t y = std::max(band.first, -down); y < std::min(band.last, a.in_h - down); ++y) {
        const int64_t from = (sample * read + y + down - rows.first) * a.in_w + right;
        const int64_t to = (sample * written + y - band.first) * a.w_out;
        for (int64_t x = first; x < last; ++x) {
          const int64_t begin = from + x ? in.end[from + x - 1] : 0;
          const typename Rows::List list = {in.value + begin, in.at + begin,
                                            in.end[from + x] - begin};
          kernel(list, in.panel, out.results + (to + x) * out.pitch() + k, lanes, false);
        }
      }
    }
  }
};

// scratch: skip_conv_scratch() floats, aligned to cache lines.
template <class V>
void skip_zeros_conv(const SkipConv& a, const SkipBand& band, float* scratch) {
  SkipConvKernel<V>(a, band, scratch).run();
}

}  // namespace fxprune
