"""The semantic operators. Adding one is a file here and its name in ``OPS``."""

from fxprune.ops import (
    channel_norm,
    depthwise_gradients,
    depthwise_pool,
    depthwise_taps,
    dsconv,
    nm_mm,
    nm_prune,
    region,
    rnn_steps,
    skip_zeros,
    skip_zeros_conv,
    tile_conv,
    tile_conv_gradients,
    tile_gemm,
    tile_gradients,
    tile_pack,
)
from fxprune.ops.operator import Operator

OPS: tuple[Operator, ...] = (
    depthwise_taps.OPERATOR,
    tile_gemm.OPERATOR,
    tile_conv.OPERATOR,
    depthwise_gradients.INPUT,
    depthwise_gradients.WEIGHT,
    tile_gradients.INPUT,
    tile_gradients.WEIGHT,
    tile_conv_gradients.INPUT,
    tile_conv_gradients.WEIGHT,
    depthwise_pool.OPERATOR,
    channel_norm.OPERATOR,
    dsconv.OPERATOR,
    tile_pack.PACK,
    tile_pack.UNPACK,
    region.OPERATOR,
    rnn_steps.OPERATOR,
    nm_prune.OPERATOR,
    nm_mm.OPERATOR,
    skip_zeros.OPERATOR,
    skip_zeros_conv.OPERATOR,
)
