// Chooses the ISA at run time.
#include <atomic>
#include <cstdlib>

#include "fxprune/kernels.h"

namespace fxprune {
namespace {

const Kernels* find(const std::string& name) {
  if (name == "scalar") return &kScalarKernels;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (name == "avx2" && avx2) return &kAvx2Kernels;
  if (name == "avx512" && avx512) return &kAvx512Kernels;
#endif
  return nullptr;
}

const Kernels* best() {
  // A cap the machine does not reach leaves what it has.
  const char* cap = std::getenv("FXPRUNE_ISA");
  if (cap != nullptr) {
    const std::string name = cap;
    if (name == "scalar") return find(name);
    if (name == "avx2" && find(name)) return find(name);
  }
  for (const char* name : {"avx512", "avx2"}) {
    if (const Kernels* found = find(name)) return found;
  }
  return &kScalarKernels;
}

std::atomic<const Kernels*>& active() {
  static std::atomic<const Kernels*> value{best()};
  return value;
}

}  // namespace

const Kernels& kernels() {
  return *active().load(std::memory_order_relaxed);
}

bool set_isa(const std::string& name) {
  const Kernels* found = find(name);
  if (found == nullptr) return false;
  active().store(found, std::memory_order_relaxed);
  return true;
}

}  // namespace fxprune
