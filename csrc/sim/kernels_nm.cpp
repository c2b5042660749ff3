// n:m pruning and products of what it leaves on the simulator, as C functions for the tests (see
// entry.h).
#include "fxprune/cuda/nm_gemm.cuh"
#include "fxprune/cuda/nm_prune.cuh"
#include "sim/entry.h"

using namespace fxprune;
using namespace fxprune::gpu;

#pragma GCC visibility push(default)
extern "C" {

// sizes: key's length, layer, function, row-major, samples, channels, positions, groups, n, m.
const char* fxprune_sim_nm_prune(int type, const void* x, const int64_t* key, float* factors,
                                 void* out, const int64_t* sizes) {
  return guarded([&] {
    NmPruneArgs a{};
    a.x = x, a.key = key, a.factors = factors, a.out = out;
    a.key_count = sizes[0], a.layer = sizes[1];
    a.function = static_cast<NmFunction>(sizes[2]);
    a.row_major = sizes[3] != 0;
    int64_t* const fields[] = {&a.samples, &a.channels, &a.positions, &a.conv_groups, &a.n, &a.m};
    for (int i = 0; i < 6; ++i) *fields[i] = sizes[4 + i];
    Simulator simulator;
    with_type(type, [&](auto t) { nm_prune<decltype(t)>(simulator, a); });
  });
}

// The numbers of 16-bit elements that `packed` and `places` must have room for.
void fxprune_sim_nm_gemm_room(const int64_t* sizes, int64_t* room) {
  NmGemmArgs a{};
  a.rows = sizes[0], a.k = sizes[1], a.n = sizes[2];
  room[0] = a.packed_elements(), room[1] = a.places_elements();
}

// sizes: rows, k, n.
const char* fxprune_sim_nm_gemm(int type, const void* x, const void* weight, void* out,
                                void* packed, uint16_t* places, const int64_t* sizes) {
  return guarded([&] {
    NmGemmArgs a{x, weight, out, packed, places, sizes[0], sizes[1], sizes[2], false, false};
    Simulator simulator;
    if (type == 1) return nm_gemm<Half>(simulator, a);
    nm_gemm<Bfloat>(simulator, a);
  });
}

}  // extern "C"
#pragma GCC visibility pop
