"""The semantic operators. Adding one is a file here and its name in ``OPS``."""

from fxprune.ops import (
    depthwise_gradients,
    depthwise_pool,
    depthwise_taps,
    dsconv,
    nm_prune,
    region,
    rnn_steps,
    tile_conv,
    tile_gemm,
    tile_pack,
)
from fxprune.ops.operator import Operator

OPS: tuple[Operator, ...] = (
    depthwise_taps.OPERATOR,
    tile_gemm.OPERATOR,
    tile_conv.OPERATOR,
    depthwise_gradients.INPUT,
    depthwise_gradients.WEIGHT,
    depthwise_pool.OPERATOR,
    dsconv.OPERATOR,
    tile_pack.PACK,
    tile_pack.UNPACK,
    region.OPERATOR,
    rnn_steps.OPERATOR,
    nm_prune.OPERATOR,
)
# those that no forward graph holds
BACKWARD_ONLY = ("nm_prune", "depthwise_grad_input", "depthwise_grad_weight")
