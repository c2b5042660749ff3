// A product whose left operand holds many zeros, which are skipped: out = x w.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fxprune {

struct SkipZeros {
  const float* x;  // (samples, positions, n) in memory if row_major, else (samples, n, positions)
  const float* w;  // (n, k)
  float* out;      // as x, with k for n
  int64_t samples, positions, n, k;
  bool row_major;

  int64_t rows() const { return samples * positions; }
};

constexpr int64_t kSkipRows = 512;  // rows of a unit, which share a panel of w
constexpr int64_t kSkipPart = 128;  // channels of a panel of w
constexpr int64_t kSkipVecs = 8;    // vectors of output features of a panel

// Floats of scratch that a unit of `rows` rows needs on vectors of `width`: the panel; values,
// positions in the panel and ends of the rows' lists; a square; and outside of row-major memory the
// results.
inline int64_t skip_scratch(const SkipZeros& a, int64_t rows, int64_t width) {
  const int64_t part = std::min(kSkipPart, a.n), lists = rows * part + 2 * width;
  const int64_t results = a.row_major ? 0 : (rows + width) * (a.k + width);
  return part * kSkipVecs * width + 2 * lists + rows + width * width + results + 6 * 16;
}

// The data gradient of a convolution with stride 1: out[y][x] = sum over the window of
// x[y + pad_h - r][x + pad_w - s] w[r][s].
struct SkipConv {
  SkipZeros x;     // positions = in_h * in_w
  SkipZeros out;   // positions = h * w, n = 0; reads nothing
  const float* w;  // (n, r, s, k)
  int64_t in_h, in_w, h, w_out, r, s, pad_h, pad_w;
};

// Samples [first_sample, last_sample) of output rows [first, last); several samples only of all
// rows.
struct SkipBand {
  int64_t first_sample, last_sample, first, last;

  int64_t samples() const { return last_sample - first_sample; }
};

// Rows [first, last) of x that a band reads.
struct SkipRows {
  int64_t first, last;

  SkipRows(const SkipConv& a, const SkipBand& band)
      : first(std::clamp<int64_t>(band.first + a.pad_h - a.r + 1, 0, a.in_h)),
        last(std::clamp<int64_t>(band.last + a.pad_h, first, a.in_h)) {}
};

// Floats of scratch that a band needs on vectors of `width`.
inline int64_t skip_conv_scratch(const SkipConv& a, const SkipBand& band, int64_t width) {
  const SkipRows rows(a, band);
  const int64_t read = band.samples() * (rows.last - rows.first) * a.in_w;
  const int64_t written = band.samples() * (band.last - band.first) * a.w_out;
  return skip_scratch(a.x, read, width) + skip_scratch(a.out, written, width);
}

}  // namespace fxprune
