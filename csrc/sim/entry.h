// What the C functions for the tests share. Each of them returns null, or what went wrong; the text
// lives until the next call.
#pragma once

#include <string>

#include "fxprune/cuda/number.cuh"
#include "sim/machine.h"

namespace fxprune::gpu {

struct Simulator {
  template <class Kernel>
  void launch(const int64_t (&grid)[3], int64_t shared_bytes, const typename Kernel::Args& a) {
    sim::launch(grid, Kernel::kThreads, Kernel::kBlocks, shared_bytes, [&a] { Kernel::run(a); });
  }
  // What a block may have.
  int64_t most_shared_bytes() const { return sim::most_shared(); }
};

// Calls work(T()) with the element type of the given number.
template <class Work>
void with_type(int type, Work work) {
  with_element(static_cast<Element>(type), work);
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

}  // namespace fxprune::gpu
