// n:m pruning on the simulator, as C functions for the tests (see entry.h).
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

}  // extern "C"
#pragma GCC visibility pop
