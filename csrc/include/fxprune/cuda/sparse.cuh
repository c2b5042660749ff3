// The tensor cores' instruction for a left operand of which two in four are kept, like ptx.cuh.
#pragma once

#include <type_traits>

#include "fxprune/cuda/ptx.cuh"

#ifdef __CUDACC__

namespace fxprune::gpu {

// d (16x8) += a (16x32, kept elements only: 16x16) * b (32x8). d and a lie as in
// multiply_16x8x16(), b has pairs along k at (2t, g), (2t+8, g), (2t+16, g), (2t+24, g). Where kept
// elements were: two bits each, the lower one first and different, four of them per element pair of
// k. With g = lane/4, lane 4g + 2*Pair holds those of k 0..15 of row g in bits 0..15 and of row g+8
// in bits 16..31, and the lane behind it those of k 16..31; the other two lanes' are not read.
template <class T, int Pair>
FXPRUNE_GPU void multiply_sparse_16x8x32(float* d, const uint32_t (&a)[4], const uint32_t (&b)[4],
                                         uint32_t places) {
  static_assert(sizeof(T) == 2 && (Pair == 0 || Pair == 1), "16-bit elements, one of two pairs");
#define FXPRUNE_MMA_SP(type)                                                                  \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type    \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, "                \
               "{%0, %1, %2, %3}, %12, %13;"                                                  \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                               \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), \
                 "r"(b[3]), "r"(places), "n"(Pair))
  if constexpr (std::is_same_v<T, Half>) {
    FXPRUNE_MMA_SP("f16");
  } else {
    FXPRUNE_MMA_SP("bf16");
  }
#undef FXPRUNE_MMA_SP
}

}  // namespace fxprune::gpu
#endif
