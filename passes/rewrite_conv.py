"""Rewrite a chosen convolution into ``fxprune::tile_conv``.

    conv2d(x, w, b, ...)  =>  tile_conv(x, values, index, tile_ptr, columns, b, ...)
    conv1d(x, w, b, ...)  =>  squeeze(tile_conv(unsqueeze(x), ...))

In training the live weight is packed in the graph by ``fxprune::tile_pack``.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from ..context import Context, Decision
from ..graph import call, replace
from ..sparsity import tile
from .rewrite_depthwise import as_image, from_image
from .rewrite_gemm import packed


def rewrite_conv(gm: GraphModule, ctx: Context) -> int:
    """Return the number of convolutions rewritten."""
    chosen = [d for d in ctx.decisions if d.chosen and d.match.kind == "conv"]
    for decision in chosen:
        _rewrite(decision, ctx)
    return len(chosen)


def _rewrite(decision: Decision, ctx: Context) -> None:
    match = decision.match
    unit = ctx.kernels.unit(match.kind, match.value.dtype, match.value.device)
    width = match.tile_width(unit.granularity)
    layer = decision.mask or tile.keep_all(match.matrix_shape, width)
    weight = packed(match, layer, ctx, match.node.name)
    x, (n, _) = as_image(match), match.matrix_shape
    operands = (n, layer.tiling.granularity, *match.geometry.windows, match.geometry.groups, "none")
    new = call(match.node, torch.ops.fxprune.tile_conv.default, x, *weight, ctx.bias(match), None, *operands)
    replace(match.node, from_image(match, new))
