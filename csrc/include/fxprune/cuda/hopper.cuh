// The instructions that only sm_90a has, like ptx.cuh: mbarriers, bulk copies, wgmma.
#pragma once

#include "fxprune/cuda/ptx.cuh"

namespace fxprune::gpu {

// The wgmma descriptor of a 16-bit operand that lies K row after K row: panels of 64 elements (128
// bytes a row, 16-byte chunk c of row k at chunk c ^ k%8), `panel_bytes` apart. The address is that
// of the first row, a multiple of 1024 bytes.
FXPRUNE_BOTH uint64_t matrix_descriptor(uint32_t address, uint32_t panel_bytes) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{8 * 128 / 16} << 32;
  return kSwizzle128 | kEightRows | uint64_t{panel_bytes / 16} << 16 | (address & 0x3ffff) / 16;
}

}  // namespace fxprune::gpu

#ifdef __CUDACC__

namespace fxprune::gpu {

// ---- mbarriers: 8 bytes of shared memory each ----

FXPRUNE_GPU void mbarrier_init(void* at, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(arrivals)
               : "memory");
}
// Makes initialised mbarriers visible to the copy engine; a barrier makes them visible to threads.
FXPRUNE_GPU void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
FXPRUNE_GPU void mbarrier_arrive(void* at) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(at)) : "memory");
}
// Arrives, and lets the phase wait for `bytes` of bulk copies as well.
FXPRUNE_GPU void mbarrier_arrive_expect(void* at, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)),
               "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of the given parity; the first phase has parity 0.
FXPRUNE_GPU void mbarrier_wait(void* at, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(shared_address(at)),
      "r"(parity)
      : "memory");
}

// One thread copies `bytes` (a multiple of 16) from global to shared memory; `mbarrier` hears of
// it.
FXPRUNE_GPU void copy_bulk(void* to, const void* from, int bytes, void* mbarrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(mbarrier))
      : "memory");
}

// What this thread wrote to shared memory becomes visible to wgmma and the copy engine.
FXPRUNE_GPU void fence_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

template <int Count>
FXPRUNE_GPU void registers_release() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}
template <int Count>
FXPRUNE_GPU void registers_acquire() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// ---- matrices on a warpgroup ----

FXPRUNE_GPU void product_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
FXPRUNE_GPU void product_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int Left>
FXPRUNE_GPU void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
}
// Keeps the compiler from moving uses of the accumulators across a wait or a fence.
template <int N>
FXPRUNE_GPU void product_pin(float (&d)[N]) {
  FXPRUNE_UNROLLED
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// clang-format off
#define FXPRUNE_D8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define FXPRUNE_WGMMA(type)                                                                      \
  asm volatile(                                                                                  \
      "{\n.reg .pred more;\nsetp.ne.b32 more, %66, 0;\n"                                         \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " "                           \
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"  \
      "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45," \
      "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"                \
      " %64, %65, more, 1, 1, 1, 1;\n}"                                                          \
      : FXPRUNE_D8(0), FXPRUNE_D8(8), FXPRUNE_D8(16), FXPRUNE_D8(24), FXPRUNE_D8(32),            \
        FXPRUNE_D8(40), FXPRUNE_D8(48), FXPRUNE_D8(56)                                           \
      : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)))
// clang-format on

// d (64x128) = a (64x16) * b (16x128), plus d when `accumulate`; a and b by matrix_descriptor. With
// w the warp of the warpgroup, g = lane/4 and t = lane%4: d[4*j + 2*h + i] is (16w + g + 8h, 8j +
// 2t + i).
template <class T>
FXPRUNE_GPU void multiply_64x128x16(float (&d)[64], uint64_t a, uint64_t b, bool accumulate);

template <>
FXPRUNE_GPU void multiply_64x128x16<Half>(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
  FXPRUNE_WGMMA("f16");
}
template <>
FXPRUNE_GPU void multiply_64x128x16<Bfloat>(float (&d)[64], uint64_t a, uint64_t b,
                                            bool accumulate) {
  FXPRUNE_WGMMA("bf16");
}
#undef FXPRUNE_WGMMA
#undef FXPRUNE_D8

}  // namespace fxprune::gpu
#endif
