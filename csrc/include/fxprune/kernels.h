// The kernels of one ISA, and the choice among the ISAs of this machine.
#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "fxprune/add_squares.h"
#include "fxprune/attention.h"
#include "fxprune/attention_rows.h"
#include "fxprune/channel_norm.h"
#include "fxprune/clear_rows.h"
#include "fxprune/depthwise_taps.h"
#include "fxprune/held_scores.h"
#include "fxprune/mask_tiles.h"
#include "fxprune/max_pool.h"
#include "fxprune/nm_prune.h"
#include "fxprune/skip_zeros.h"
#include "fxprune/tile_conv.h"
#include "fxprune/tile_gemm.h"
#include "fxprune/tile_image.h"
#include "fxprune/tile_scores.h"

namespace fxprune {

struct Bf16Kernels {
#define FXPRUNE_KERNEL(name, signature) std::add_pointer_t<signature> name;
#include "cpu/kernels_bf16.inc"
#undef FXPRUNE_KERNEL
};

struct Kernels {
  const char* isa;
  int64_t width;      // floats per vector
  int64_t tile_vecs;  // pixel vectors of a feature-major register tile
#define FXPRUNE_KERNEL(name, signature) std::add_pointer_t<signature> name;
#include "cpu/kernels.inc"
#undef FXPRUNE_KERNEL
  Bf16Kernels bf16;
};

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvx512Kernels;
// Instruction sets that add to avx512 in bfloat16 alone.
extern const Bf16Kernels kAvx512Bf16Kernels, kAmxKernels;
#endif

// The best kernels this machine can run, at most those set_isa or the environment's FXPRUNE_ISA
// allow.
const Kernels& kernels();

// Caps the ISA; false when the name is unknown or the machine lacks it. For tests and debugging.
bool set_isa(const std::string& name);

}  // namespace fxprune
