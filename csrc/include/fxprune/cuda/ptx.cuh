// Every instruction of the GPU that C++ does not have, and every access to memory, each behind one
// function. Under nvcc these are the instructions; on the host they are the simulator's twins of
// the same names (csrc/sim/ptx.h). Kernels use nothing else, so one source serves both.
//
// Pointers to shared memory are plain pointers into shared_memory().
#pragma once

#include "fxprune/cuda/number.cuh"

#ifndef __CUDACC__
#include "sim/ptx.h"
#else

namespace fxprune::gpu {

extern __shared__ __align__(1024) char dynamic_shared[];

FXPRUNE_GPU char* shared_memory() {
  return dynamic_shared;
}
FXPRUNE_GPU int thread() {
  return threadIdx.x;
}
FXPRUNE_GPU int thread_count() {
  return blockDim.x;
}
FXPRUNE_GPU int64_t block(int axis) {
  return axis == 0 ? blockIdx.x : axis == 1 ? blockIdx.y : blockIdx.z;
}
FXPRUNE_GPU int64_t blocks(int axis) {
  return axis == 0 ? gridDim.x : axis == 1 ? gridDim.y : gridDim.z;
}

FXPRUNE_GPU uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- memory ----

template <class T>
FXPRUNE_GPU T load_shared(const void* from) {
  return *static_cast<const T*>(from);
}
// As load_shared<Quad>(), but never merged with another load of the same bytes.
FXPRUNE_GPU Quad load_shared_anew(const void* from) {
  Quad quad;
  asm volatile("ld.volatile.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(quad.word[0]), "=r"(quad.word[1]), "=r"(quad.word[2]), "=r"(quad.word[3])
               : "r"(shared_address(from)));
  return quad;
}
template <class T>
FXPRUNE_GPU void store_shared(void* to, T value) {
  *static_cast<T*>(to) = value;
}
template <class T>
FXPRUNE_GPU T load_global(const void* from) {
  return *static_cast<const T*>(from);
}
template <class T>
FXPRUNE_GPU void store_global(void* to, T value) {
  *static_cast<T*>(to) = value;
}

// Asks for nothing, but keeps the compiler from repeating the conversions that made `x`.
FXPRUNE_GPU void keep(float& x) {
  asm volatile("" : "+f"(x));
}

// ---- barriers ----

FXPRUNE_GPU void barrier() {
  __syncthreads();
}
FXPRUNE_GPU void sync_warp() {
  __syncwarp();
}
FXPRUNE_GPU float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// ---- asynchronous copies to shared memory ----

// Copies `Bytes` (4, 8 or 16), or writes as many zeros when not `valid`.
template <int Bytes>
FXPRUNE_GPU void copy_async(void* to, const void* from, bool valid) {
  const int size = valid ? Bytes : 0;
  if constexpr (Bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(size)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to)),
                 "l"(from), "n"(Bytes), "r"(size)
                 : "memory");
  }
}
FXPRUNE_GPU void copy_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `Left` groups of this thread are under way.
template <int Left>
FXPRUNE_GPU void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Left) : "memory");
}

// ---- matrices on a warp ----

// Four 8x8 matrices of 16-bit elements, transposed: lane i gives the address of row i%8 of matrix
// i/8, and gets of matrix j the elements (2*(lane%4) + {0, 1}, lane/4) in r[j].
FXPRUNE_GPU void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, not transposed: of matrix j the elements (lane/4, 2*(lane%4) + {0, 1}) in r[j].
FXPRUNE_GPU void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d (16x8) += a (16x16) * b (16x8). With g = lane/4 and t = lane%4: d holds (g, 2t), (g, 2t+1),
// (g+8, 2t), (g+8, 2t+1); a holds pairs along k at (g, 2t), (g+8, 2t), (g, 2t+8), (g+8, 2t+8); b
// holds pairs along k at (2t, g), (2t+8, g).
template <class T>
FXPRUNE_GPU void multiply_16x8x16(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
FXPRUNE_GPU void multiply_16x8x16<Half>(float* d, const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
FXPRUNE_GPU void multiply_16x8x16<Bfloat>(float* d, const uint32_t (&a)[4], uint32_t b0,
                                          uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Nearest float with 10 bits behind the point, ties away from zero: what TF32 products read.
FXPRUNE_GPU uint32_t round_tf32(float x) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
}

// d (16x8) += a (16x8) * b (8x8) of TF32. With g = lane/4 and t = lane%4: d as above; a holds (g,
// t), (g+8, t), (g, t+4), (g+8, t+4); b holds (t, g), (t+4, g).
FXPRUNE_GPU void multiply_16x8x8(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace fxprune::gpu
#endif
