// What vectors that cannot compress write lane by lane, in plain C++.
#pragma once

#include <cstdint>

namespace fxprune {

// V: whose instruction set this is compiled for, so that each has a copy of its own.
template <class V>
struct PortableLists {
  // Writes the numbers other than 0 among p[0 .. n), and `at + step * lane` of each; returns how
  // many. Both are whole vectors of memory.
  static int64_t nonzeros(const float* p, int64_t n, int64_t at, int64_t step, float* value,
                          int32_t* index) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) {
      value[count] = p[i];
      index[count] = static_cast<int32_t>(at + step * i);
      count += p[i] != 0;
    }
    return count;
  }
};

}  // namespace fxprune
