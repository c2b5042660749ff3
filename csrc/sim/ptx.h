// The host twins of fxprune/cuda/ptx.cuh and hopper.cuh, on the simulated block.
#pragma once

#include <cstring>

#include "fxprune/cuda/number.cuh"
#include "sim/machine.h"

namespace fxprune::gpu {

inline char* shared_memory() {
  return sim::place().shared;
}
inline int thread() {
  return sim::place().thread;
}
inline int thread_count() {
  return sim::place().threads;
}
inline int64_t block(int axis) {
  return sim::place().block[axis];
}
inline int64_t blocks(int axis) {
  return sim::place().grid[axis];
}
inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - sim::place().shared);
}

template <class T>
T load_shared(const void* from) {
  T value;
  sim::read_shared(&value, from, sizeof(T));
  return value;
}
inline Quad load_shared_anew(const void* from) {
  return load_shared<Quad>(from);
}
template <class T>
void store_shared(void* to, T value) {
  sim::write_shared(to, &value, sizeof(T));
}
template <class T>
T load_global(const void* from) {
  T value;
  sim::read_global(&value, from, sizeof(T));
  return value;
}
template <class T>
void store_global(void* to, T value) {
  sim::write_global(to, &value, sizeof(T));
}
inline void keep(float&) {}

inline void barrier() {
  sim::barrier(0, thread_count());
}
inline void sync_warp() {
  sim::sync_warp();
}
float shuffle_xor(float value, int mask);

template <int Bytes>
void copy_async(void* to, const void* from, bool valid) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  sim::copy_async(to, from, Bytes, valid ? Bytes : 0);
}
inline void copy_commit() {
  sim::copy_commit();
}
template <int Left>
void copy_wait() {
  sim::copy_wait(Left);
}

void load_matrices(uint32_t (&r)[4], const void* row);
void load_matrices_transposed(uint32_t (&r)[4], const void* row);

// d (rows x columns) += a * b, all in float, as the tensor cores do it.
void multiply_warp(float* d, const uint32_t* a, const uint32_t* b, float (*convert)(uint16_t));

template <class T>
float convert_bits(uint16_t bits) {
  return to_float(T{bits});
}

template <class T>
void multiply_16x8x16(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const uint32_t b[2] = {b0, b1};
  multiply_warp(d, a, b, &convert_bits<T>);
}

// Rounded to the nearest with 10 bits behind the point, ties away from zero.
inline uint32_t round_tf32(float x) {
  const uint32_t bits = bits_of_float(x);
  return (bits >> 23 & 0xff) == 0xff ? bits : (bits + 0x1000) & ~uint32_t{0x1fff};
}
// d (16x8) += a (16x8) * b (8x8) of TF32: the low 13 bits of the operands are not read.
void multiply_16x8x8(float* d, const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// The same for a left operand with two kept elements in four, whose places lie in lanes 4g + 2*pair
// and 4g + 2*pair + 1.
void multiply_warp_sparse(float* d, const uint32_t* a, const uint32_t* b, uint32_t places, int pair,
                          float (*convert)(uint16_t));

template <class T, int Pair>
void multiply_sparse_16x8x32(float* d, const uint32_t (&a)[4], const uint32_t (&b)[4],
                             uint32_t places) {
  multiply_warp_sparse(d, a, b, places, Pair, &convert_bits<T>);
}

// ---- sm_90a ----

inline void mbarrier_init(void* at, int arrivals) {
  sim::mbarrier_init(at, arrivals);
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(void* at) {
  sim::mbarrier_arrive(at, 0);
}
inline void mbarrier_arrive_expect(void* at, int bytes) {
  sim::mbarrier_arrive(at, bytes);
}
inline void mbarrier_wait(void* at, int parity) {
  sim::mbarrier_wait(at, parity);
}
inline void copy_bulk(void* to, const void* from, int bytes, void* mbarrier) {
  sim::copy_bulk(to, from, bytes, mbarrier);
}
inline void fence_proxy() {
  sim::fence_proxy();
}
template <int Count>
void registers_release() {
  static_assert(Count % 8 == 0 && Count >= 24 && Count <= 256, "setmaxnreg takes 24, 32 .. 256");
  sim::registers_release(Count);
}
template <int Count>
void registers_acquire() {
  static_assert(Count % 8 == 0 && Count >= 24 && Count <= 256, "setmaxnreg takes 24, 32 .. 256");
  sim::registers_acquire(Count);
}

void product_fence();
void product_commit();
void product_wait_for(int groups_left);
template <int Left>
void product_wait() {
  product_wait_for(Left);
}
template <int N>
void product_pin(float (&)[N]) {}

void multiply_warpgroup(float* d, uint64_t a, uint64_t b, bool accumulate,
                        float (*convert)(uint16_t));

template <class T>
void multiply_64x128x16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  multiply_warpgroup(d, a, b, accumulate, &convert_bits<T>);
}

}  // namespace fxprune::gpu
