"""Rewrite a chosen GEMM into ``fxprune::tile_gemm``.

    linear(x, w, b)              =>  tile_gemm(x, values, index, tile_ptr, columns, b, feature_dim=-1)
    conv2d 1x1 (x, w, b, stride) =>  tile_gemm(x[:, :, ::s, ::s], ..., feature_dim=1)

Elements beside the tiles are a GEMM of their own, whose result is the residual of the other. In training the live weight
is packed in the graph by ``fxprune::tile_pack``.
"""

from __future__ import annotations

from dataclasses import replace as replace_fields

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..context import Context, Decision
from ..errors import TileMismatch
from ..graph import aten, call, replace
from ..match import Match
from ..sparsity import tile
from ..sparsity.pattern import LayerMask
from ..weights import StructureChanged
from .rewrite_depthwise import keeps

_TILE_GEMM = torch.ops.fxprune.tile_gemm.default


def rewrite_gemm(gm: GraphModule, ctx: Context) -> int:
    """Return the number of GEMMs rewritten."""
    chosen = [d for d in ctx.decisions if d.chosen and d.match.kind in ("pointwise", "linear")]
    for decision in chosen:
        _rewrite(decision, ctx)
    return len(chosen)


def _rewrite(decision: Decision, ctx: Context) -> None:
    match = decision.match
    unit = ctx.kernels.unit(match.kind, match.value.dtype, match.value.device)
    layer = decision.mask or tile.keep_all(match.matrix_shape, unit.granularity)
    n, _ = match.matrix_shape
    feature_dim = 1 if match.kind == "pointwise" else -1
    one_pixel = match.kind == "linear" and len(match.geometry.x) == 4 and match.value.dim() == 4
    x = call(match.node, aten.flatten.using_ints, match.x, 1) if one_pixel else _strided(match)
    rest = None
    if layer.rest is not None:
        elements = packed(match, layer.rest, ctx, f"{match.node.name}_rest", layer.mask)
        rest = call(match.node, _TILE_GEMM, x, *elements, None, None, None, n, 1, feature_dim, "none")
        layer = replace_fields(layer, mask=layer.mask & ~layer.rest.mask, rest=None)
    weight = packed(match, layer, ctx, match.node.name, (decision.mask or layer).mask)
    operands = (x, *weight, ctx.bias(match), rest, None, n, layer.tiling.granularity, feature_dim, "none")
    new = call(match.node, _TILE_GEMM, *operands)
    if one_pixel:
        new = call(match.node, aten.unflatten.int, new, 1, [n, 1, 1])
    replace(match.node, new)


def packed(match: Match, layer: LayerMask, ctx: Context, prefix: str, whole: Tensor | None = None) -> tuple[Node, ...]:
    """Return the nodes of (values, index, tile_ptr, columns); those of graph inputs are named after ``prefix``.

    whole: the mask that the weight obeys, of which ``layer`` is a part; ``None``: that of ``layer``.
    """

    def build(weight: Tensor) -> tuple[Tensor, ...]:
        operands = tile.operands(view.matrix(weight), layer.mask, layer.tiling)
        if not inference:
            return tuple(operands)
        try:
            return tuple(tile.imaged(operands, layer.tiling, device, layer.halved, tf32))
        except TileMismatch as error:  # a weight that changed keeps more than two in four
            raise StructureChanged from error

    view, device, inference = match.view, match.value.device, ctx.inference
    tf32 = match.tf32  # the same when a weight is packed again
    labels = [f"{prefix}_{name}" for name in tile.OPERANDS]
    if ctx.inference:
        return ctx.weights.derive(labels, (match.weight,), build, keeps(match, layer.mask if whole is None else whole, ctx))
    with torch.no_grad():
        first, *fixed = build(match.value.detach().cpu())
    count = first.shape[0]
    structure = ctx.weights.derive(labels[1:], (), lambda: tuple(fixed))
    n, k = match.matrix_shape
    if match.transposed:
        matrix = call(match.node, aten.t.default, match.weight)
    else:
        matrix = call(match.node, aten.reshape.default, match.weight, [n, k])
    arguments = (matrix, *structure, layer.tiling.granularity, count)
    values = call(match.node, torch.ops.fxprune.tile_pack.default, *arguments)
    return (values, *structure)


def _strided(match: Match) -> Node:
    """A strided 1x1 convolution reads every s-th pixel."""
    x = match.x
    for dim, step in enumerate(match.geometry.stride[4 - match.value.dim() :], start=2):
        if step != 1:
            x = call(match.node, aten.slice.Tensor, x, dim, 0, 2**63 - 1, step)
    return x
