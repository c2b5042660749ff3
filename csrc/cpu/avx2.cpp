// The kernels compiled for avx2. Everything that is not a kernel is included ahead of the pragma,
// so that no inline function shared with other translation units is compiled for this ISA.
#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "fxprune/kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

#include "fxprune/add_squares_lanes.h"
#include "fxprune/attention_heads.h"
#include "fxprune/attention_rows_head.h"
#include "fxprune/channel_mean.h"
#include "fxprune/channel_norm_blocks.h"
#include "fxprune/clear_rows_lanes.h"
#include "fxprune/depthwise_bf16.h"
#include "fxprune/depthwise_planes.h"
#include "fxprune/held_scores_lanes.h"
#include "fxprune/mask_tiles_lanes.h"
#include "fxprune/max_pool_lines.h"
#include "fxprune/nm_prune_lanes.h"
#include "fxprune/partial_sums.h"
#include "fxprune/rnn_cell.h"
#include "fxprune/skip_zeros_conv.h"
#include "fxprune/skip_zeros_rows.h"
#include "fxprune/tile_conv_bf16.h"
#include "fxprune/tile_conv_planes.h"
#include "fxprune/tile_gemm_bf16_feature_major.h"
#include "fxprune/tile_gemm_bf16_row_major.h"
#include "fxprune/tile_gemm_feature_major.h"
#include "fxprune/tile_gemm_panel.h"
#include "fxprune/tile_gemm_row_major.h"
#include "fxprune/tile_pack.h"
#include "fxprune/tile_row_bf16.h"
#include "fxprune/tile_scores_lanes.h"
#include "fxprune/vec_avx2.h"

namespace fxprune {

const Kernels kAvx2Kernels = {
    "avx2",
    Avx2::kWidth,
    Avx2::kTileVecs,
#define FXPRUNE_KERNEL(name, signature) &name<Avx2>,
#include "cpu/kernels.inc"
#undef FXPRUNE_KERNEL
    {
#define FXPRUNE_KERNEL(name, signature) &name<Avx2>,
#include "cpu/kernels_bf16.inc"
#undef FXPRUNE_KERNEL
    },
};

}  // namespace fxprune

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__
