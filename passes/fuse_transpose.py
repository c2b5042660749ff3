"""Run a channels-last chain feature-major, so that the transposes around it cancel.

    permute(x, NHWC) -> layer_norm(C) -> tile_gemm(-1) -> gelu -> tile_gemm(-1) -> permute(NCHW)
        =>  channel_norm(x) -> tile_gemm(1) -> gelu -> tile_gemm(1)

Chains whose products are our GEMMs (``regions.py``); one reader that is no exit, and a chain stays as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..context import Context
from ..graph import argument, aten, call, fake, is_call, replace, shape
from .regions import chain

_FEATURE_DIM = 10
_KERNELS = (torch.float32, torch.bfloat16)  # the types channel_norm has kernels for


def fuse_transpose(gm: GraphModule, ctx: Context) -> int:
    """Return the number of permutes removed."""
    removed = 0
    for node in list(gm.graph.nodes):
        found = chain(node, _is_product)
        if found is not None:
            removed += _rewrite(node, *found, ctx)
    return removed


def _is_product(node: Node) -> bool:
    gemm = is_call(node, torch.ops.fxprune.tile_gemm.default)
    return gemm and argument(node, "feature_dim") == -1 and argument(node, "residual") is None


def _rewrite(start: Node, inner: list[Node], exits: list[Node], ctx: Context) -> int:
    moved: dict[Any, Any] = {start: start.args[0]}
    around = [start.args[0], *inner, *(user for node in exits for user in node.users)]
    one_call = ctx.inference and any(map(_is_ours, around))
    for node in inner:
        x = moved[node.args[0]]
        if is_call(node, aten.layer_norm.default):
            moved[node] = _channel_norm(node, x, one_call)
        elif is_call(node, torch.ops.fxprune.tile_gemm.default):
            operands = [x, *node.args[1:]]
            operands[_FEATURE_DIM] = 1
            moved[node] = call(node, node.target, *operands)
        else:
            moved[node] = call(node, node.target, x, *node.args[1:])
    for node in exits:
        replace(node, moved[node.args[0]])
    for node in [*reversed(inner), start]:
        start.graph.erase_node(node)
    return 1 + len(exits)


def _is_ours(node: Any) -> bool:
    return isinstance(node, Node) and getattr(node.target, "namespace", "") == "fxprune"


def _channel_norm(node: Node, x: Node, one_call: bool) -> Node:
    """LayerNorm over dimension 1 of (B, C, H, W): one operator beside our kernels on a CPU, outside training."""
    result = fake(node)
    assert result is not None, node
    weight, bias = [*node.args[2:], *[None] * 3][:2]
    eps = node.args[4] if len(node.args) > 4 else 1e-5
    if one_call and isinstance(eps, float) and result.device.type == "cpu" and result.dtype in _KERNELS:
        return call(node, torch.ops.fxprune.channel_norm.default, x, weight, bias, eps)
    return _spelled_out(node, x, weight, bias, eps)


def _spelled_out(node: Node, x: Node, weight: Any, bias: Any, eps: Any) -> Node:
    """In the operations Inductor fuses into one loop; in float32, as eager's."""
    dtype = fake(node).dtype  # type: ignore[union-attr]
    halves = dtype in (torch.bfloat16, torch.float16)
    if halves:
        x = call(node, aten.to.dtype, x, torch.float32)
    mean = call(node, aten.mean.dim, x, [1], True)
    centred = call(node, aten.sub.Tensor, x, mean)
    variance = call(node, aten.mean.dim, call(node, aten.mul.Tensor, centred, centred), [1], True)
    y = call(node, aten.mul.Tensor, centred, call(node, aten.rsqrt.default, call(node, aten.add.Scalar, variance, eps)))
    for operand, target in ((weight, aten.mul.Tensor), (bias, aten.add.Tensor)):
        if operand is not None:
            y = call(node, target, y, call(node, aten.reshape.default, operand, [*(shape(operand) or ()), 1, 1]))
    return call(node, aten.to.dtype, y, dtype) if halves else y
