// The kernels in portable C++, for machines without a faster ISA and as the others' yardstick.
#include "fxprune/add_squares_lanes.h"
#include "fxprune/attention_heads.h"
#include "fxprune/attention_rows_head.h"
#include "fxprune/channel_mean.h"
#include "fxprune/channel_norm_blocks.h"
#include "fxprune/clear_rows_lanes.h"
#include "fxprune/depthwise_bf16.h"
#include "fxprune/depthwise_planes.h"
#include "fxprune/held_scores_lanes.h"
#include "fxprune/kernels.h"
#include "fxprune/mask_tiles_lanes.h"
#include "fxprune/math_scalar.h"
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
#include "fxprune/vec_scalar.h"

namespace fxprune {

const Kernels kScalarKernels = {
    "scalar",
    Scalar::kWidth,
    Scalar::kTileVecs,
#define FXPRUNE_KERNEL(name, signature) &name<Scalar>,
#include "cpu/kernels.inc"
#undef FXPRUNE_KERNEL
    {
#define FXPRUNE_KERNEL(name, signature) &name<Scalar>,
#include "cpu/kernels_bf16.inc"
#undef FXPRUNE_KERNEL
    },
};

}  // namespace fxprune
