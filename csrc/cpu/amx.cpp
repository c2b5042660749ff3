// The bfloat16 kernels compiled for amx, as avx512.cpp.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "fxprune/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                 \
    __attribute__((                                                                           \
        target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
#endif

#include "fxprune/amx.h"
#include "fxprune/attention_heads.h"
#include "fxprune/channel_norm_blocks.h"
#include "fxprune/depthwise_bf16.h"
#include "fxprune/max_pool_lines.h"
#include "fxprune/tile_conv_bf16.h"
#include "fxprune/tile_gemm_bf16_feature_major.h"
#include "fxprune/tile_gemm_bf16_row_major.h"
#include "fxprune/tile_row_bf16.h"

namespace fxprune {

const Bf16Kernels kAmxKernels = {
#define FXPRUNE_KERNEL(name, signature) &name<Amx>,
#include "cpu/kernels_bf16.inc"
#undef FXPRUNE_KERNEL
};

}  // namespace fxprune

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
