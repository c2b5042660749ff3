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

}  // namespace fxprune
