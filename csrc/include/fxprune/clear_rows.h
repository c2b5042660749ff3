// Zeros at the pruned elements of a matrix: rows [first, last) of `values` AND the bits kept.
//
//   values: rows x width elements of 2, 4 or 8 bytes
//   kept:   int8 or int32, rows / shared x width, all bits set or none
#pragma once

#include <cstdint>

namespace fxprune {

struct ClearRows {
  void* values;
  const void* kept;
  int64_t rows, width, shared;  // `shared` rows have the same bits
  int64_t element, bits;        // bytes of an element, and of its bits
};

}  // namespace fxprune
