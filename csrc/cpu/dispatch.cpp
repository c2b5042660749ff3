// Chooses the ISA at run time.
#include <atomic>
#include <cstdlib>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "fxprune/kernels.h"

namespace fxprune {
namespace {

#if defined(__x86_64__)
// Asks the kernel, once per process, to keep the tile registers; it refuses where they are missing.
bool tiles_permitted() {
#if defined(__linux__)
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

Kernels extended(const char* isa, const Bf16Kernels& bf16) {
  Kernels k = kAvx512Kernels;
  k.isa = isa;
  k.bf16 = bf16;
  return k;
}
#endif

const Kernels* find(const std::string& name) {
  if (name == "scalar") return &kScalarKernels;
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  if (name == "avx2" && avx2) return &kAvx2Kernels;
  if (name == "avx512" && avx512) return &kAvx512Kernels;
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (name == "avx512_bf16" && bf16) {
    static const Kernels found = extended("avx512_bf16", kAvx512Bf16Kernels);
    return &found;
  }
  const bool amx = bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16");
  if (name == "amx" && amx && tiles_permitted()) {
    static const Kernels found = extended("amx", kAmxKernels);
    return &found;
  }
#endif
  return nullptr;
}

const Kernels* best() {
  // A cap the machine does not reach leaves what it has.
  const char* cap = std::getenv("FXPRUNE_ISA");
  if (cap != nullptr) {
    if (const Kernels* found = find(cap)) return found;
  }
  for (const char* name : {"amx", "avx512_bf16", "avx512", "avx2"}) {
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
