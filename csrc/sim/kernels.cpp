// The GPU operators on the simulator, as C functions for the tests. Each returns null, or what went
// wrong; the text lives until the next call.
#include <string>

#include "fxprune/cuda/depthwise_taps.cuh"
#include "sim/machine.h"

namespace fxprune::gpu {
namespace {

struct Simulator {
  template <class Kernel>
  void launch(const int64_t (&grid)[3], int64_t shared_bytes, const typename Kernel::Args& a) {
    sim::launch(grid, Kernel::kThreads, shared_bytes, [&a] { Kernel::run(a); });
  }
};

// Calls work(T) for the element type of the given number: 0 float, 1 Half, 2 Bfloat.
template <class Work>
void with_type(int type, Work work) {
  if (type == 0) return work(float());
  if (type == 1) return work(Half());
  work(Bfloat());
}

template <class Work>
const char* guarded(Work work) {
  static std::string message;
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace
}  // namespace fxprune::gpu

using namespace fxprune;
using namespace fxprune::gpu;

#pragma GCC visibility push(default)
extern "C" {

void fxprune_sim_reset(uint32_t seed, int plant) {
  sim::reset(seed, static_cast<sim::Plant>(plant));
}

void fxprune_sim_declare(const void* data, int64_t bytes, bool writable) {
  sim::declare(data, bytes, writable);
}

bool fxprune_sim_all_written(const void* data) {
  return sim::all_written(data);
}

// geometry: batch, channels, height, width, out_h, out_w, tap_words, then kernel, stride, padding
// and dilation, each (h, w), then the activation.
const char* fxprune_sim_depthwise(int type, const void* x, const void* weight, const uint64_t* taps,
                                  const void* bias, void* out, const int64_t* g) {
  return guarded([&] {
    DepthwiseArgs a{};
    a.x = x, a.weight = weight, a.taps = taps, a.bias = bias, a.out = out;
    a.batch = g[0], a.channels = g[1];
    int* const fields[] = {&a.height,   &a.width,      &a.out_h,     &a.out_w,    &a.tap_words,
                           &a.kernel_h, &a.kernel_w,   &a.stride_h,  &a.stride_w, &a.pad_h,
                           &a.pad_w,    &a.dilation_h, &a.dilation_w};
    for (int i = 0; i < 13; ++i) *fields[i] = static_cast<int>(g[2 + i]);
    a.activation = static_cast<Activation>(g[15]);
    Simulator simulator;
    with_type(type, [&](auto t) { depthwise_taps<decltype(t)>(simulator, a); });
  });
}

}  // extern "C"
#pragma GCC visibility pop
