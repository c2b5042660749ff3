// Small kernels, each breaking one rule of the machine, so that a test can prove the rule is kept.
// `broken` = false runs the same kernel without the mistake.
#include <map>
#include <string>

#include "fxprune/cuda/hopper.cuh"
#include "sim/machine.h"

namespace fxprune::gpu {
namespace {

struct Case {
  int threads;
  void (*kernel)(bool broken, const uint32_t* in, uint32_t* out);
};

char* slot(int index) {
  return shared_memory() + 4 * index;
}

const std::map<std::string, Case> kCases = {
    {"missing barrier",
     {64,
      [](bool broken, const uint32_t*, uint32_t* out) {
        store_shared<uint32_t>(slot(thread()), 1);
        if (!broken) barrier();
        store_global<uint32_t>(out + thread(), load_shared<uint32_t>(slot(63 - thread())));
      }}},
    {"overwritten before it is read",
     {64,
      [](bool broken, const uint32_t*, uint32_t* out) {
        store_shared<uint32_t>(slot(thread()), 1);
        barrier();
        const uint32_t other = load_shared<uint32_t>(slot(63 - thread()));
        if (!broken) barrier();
        store_shared<uint32_t>(slot(thread()), 2);
        store_global<uint32_t>(out + thread(), other);
      }}},
    {"missing warp synchronisation",
     {32,
      [](bool broken, const uint32_t*, uint32_t* out) {
        store_shared<uint32_t>(slot(thread()), 1);
        if (!broken) sync_warp();
        store_global<uint32_t>(out + thread(), load_shared<uint32_t>(slot(31 - thread())));
      }}},
    {"uninitialised shared memory",
     {32,
      [](bool broken, const uint32_t*, uint32_t* out) {
        if (!broken || thread() != 5) store_shared<uint32_t>(slot(thread()), 1);
        store_global<uint32_t>(out + thread(), load_shared<uint32_t>(slot(thread())));
      }}},
    {"shared memory out of bounds",
     {64,
      [](bool broken, const uint32_t*, uint32_t* out) {
        store_shared<uint32_t>(shared_memory() + (broken ? 32 : 4) * thread(), 1);
        store_global<uint32_t>(out + thread(), 1);
      }}},
    {"global memory out of bounds",
     {64,
      [](bool broken, const uint32_t* in, uint32_t* out) {
        store_global<uint32_t>(out + thread(), load_global<uint32_t>(in + thread() + broken));
      }}},
    {"misaligned access",
     {1,
      [](bool broken, const uint32_t* in, uint32_t* out) {
        store_global<uint32_t>(out, load_global<Quad>(in + (broken ? 1 : 4)).word[0]);
      }}},
    {"written twice",
     {64,
      [](bool broken, const uint32_t*, uint32_t* out) {
        store_global<uint32_t>(out + (broken ? thread() / 2 : thread()), 1);
      }}},
    {"written though read-only",
     {1,
      [](bool broken, const uint32_t* in, uint32_t* out) {
        store_global<uint32_t>(broken ? const_cast<uint32_t*>(in) : out, 1);
      }}},
    {"barrier that some never reach",
     {64,
      [](bool broken, const uint32_t*, uint32_t* out) {
        if (!broken || thread() < 32) barrier();
        store_global<uint32_t>(out + thread(), 1);
      }}},
    {"lanes at different instructions",
     {32,
      [](bool broken, const uint32_t*, uint32_t* out) {
        if (broken && thread() < 16) {
          sync_warp();
        } else {
          shuffle_xor(1.0f, 1);
        }
        store_global<uint32_t>(out + thread(), 1);
      }}},
    {"cp.async read before the wait",
     {1,
      [](bool broken, const uint32_t* in, uint32_t* out) {
        copy_async<4>(slot(0), in, true);
        copy_commit();
        if (!broken) copy_wait<0>();
        store_global<uint32_t>(out, load_shared<uint32_t>(slot(0)));
        copy_wait<0>();
      }}},
    {"cp.async of another thread",
     {64,
      [](bool broken, const uint32_t* in, uint32_t* out) {
        copy_async<4>(slot(thread()), in + thread(), true);
        copy_commit();
        if (broken) barrier();
        copy_wait<0>();
        if (!broken) barrier();
        store_global<uint32_t>(out + thread(), load_shared<uint32_t>(slot(63 - thread())));
      }}},
    {"cp.async never waited for",
     {1,
      [](bool broken, const uint32_t* in, uint32_t* out) {
        copy_async<4>(slot(0), in, true);
        copy_commit();
        if (!broken) copy_wait<0>();
        store_global<uint32_t>(out, 1);
      }}},
    {"bulk copy read before its mbarrier",
     {32,
      [](bool broken, const uint32_t* in, uint32_t* out) {
        char* barrier_at = shared_memory() + 512;
        if (thread() == 0) mbarrier_init(barrier_at, 1);
        barrier();
        if (thread() == 0) {
          mbarrier_arrive_expect(barrier_at, 128);
          copy_bulk(shared_memory(), in, 128, barrier_at);
        }
        if (!broken || thread() != 7) mbarrier_wait(barrier_at, 0);
        store_global<uint32_t>(out + thread(), load_shared<uint32_t>(slot(thread())));
      }}},
    {"mbarrier that expects too little",
     {32,
      [](bool broken, const uint32_t* in, uint32_t* out) {
        char* barrier_at = shared_memory() + 512;
        if (thread() == 0) mbarrier_init(barrier_at, 1);
        barrier();
        if (thread() == 0) {
          mbarrier_arrive_expect(barrier_at, broken ? 192 : 128);
          copy_bulk(shared_memory(), in, 128, barrier_at);
        }
        mbarrier_wait(barrier_at, 0);
        store_global<uint32_t>(out + thread(), load_shared<uint32_t>(slot(thread())));
      }}},
    {"more registers than a block has",
     {384,
      [](bool broken, const uint32_t*, uint32_t* out) {
        if (thread() < 128) {
          registers_release<56>();
        } else if (broken) {
          registers_acquire<232>();
        } else {
          registers_acquire<224>();
        }
        if (thread() < 64) store_global<uint32_t>(out + thread(), 1);
      }}},
    {"mbarrier used before it is initialised",
     {64,
      [](bool broken, const uint32_t*, uint32_t* out) {
        char* barrier_at = shared_memory() + 512;
        if (thread() == 0) mbarrier_init(barrier_at, 64);
        if (!broken) barrier();
        mbarrier_arrive(barrier_at);
        mbarrier_wait(barrier_at, 0);
        store_global<uint32_t>(out + thread(), 1);
      }}},
};

}  // namespace
}  // namespace fxprune::gpu

#pragma GCC visibility push(default)
extern "C" {

// The name of case `index`, or null past the last.
const char* fxprune_sim_case(int index) {
  using fxprune::gpu::kCases;
  if (index >= static_cast<int>(kCases.size())) return nullptr;
  return std::next(kCases.begin(), index)->first.c_str();
}

// in and out: 64 words each, declared. Returns null, or the fault.
const char* fxprune_sim_run_case(int index, bool broken, const uint32_t* in, uint32_t* out) {
  static std::string message;
  const auto& entry = std::next(fxprune::gpu::kCases.begin(), index)->second;
  try {
    const int64_t grid[3] = {1, 1, 1};
    fxprune::sim::launch(grid, entry.threads, 1, 1024, [&] { entry.kernel(broken, in, out); });
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // extern "C"
#pragma GCC visibility pop
