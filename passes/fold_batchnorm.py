"""Fold inference BatchNorm into the convolution in front of it.

    batch_norm(conv2d(x, w, b), ...)  =>  conv2d(x, w * s, (b - mean) * s + beta),   s = gamma / sqrt(var + eps)

Fires for constant weights and statistics outside training; the convolution must have no other user. In bfloat16 the fold
is computed in float32 and rounded once; our kernels take the shift as it was before (``Context.float_bias``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..context import Context
from ..graph import argument, aten, call, is_call, mutation_between, replace, sole_user
from ..sparsity.pattern import FLOATS
from .match_conv import CONVOLUTIONS


def fold_batchnorm(gm: GraphModule, ctx: Context) -> int:
    """Return the number of BatchNorms folded."""
    if not ctx.inference:
        return 0
    folded = 0
    node: Node
    for node in list(gm.graph.nodes):
        conv = node.args[0] if is_call(node, aten.batch_norm.default) else None
        if is_call(conv, *CONVOLUTIONS) and sole_user(conv) is node and _constant(conv, node, ctx):
            if mutation_between(conv, node):
                continue
            _fold(conv, node, ctx)
            folded += 1
    return folded


def _operands(conv: Node, norm: Node) -> tuple[list[Node], list[bool]]:
    names = ("weight", "bias", "running_mean", "running_var")
    every = [argument(conv, "weight"), argument(conv, "bias"), *[argument(norm, n) for n in names]]
    return [n for n in every if n is not None], [n is not None for n in every]


def _constant(conv: Node, norm: Node, ctx: Context) -> bool:
    tensors = [ctx.weights.value(n) for n in _operands(conv, norm)[0]]
    fixed = not isinstance(argument(norm, "eps"), Node)  # with dynamic=True a float may be an input
    return fixed and all(t is not None and t.dtype in FLOATS for t in tensors)


def _fold(conv: Node, norm: Node, ctx: Context) -> None:
    present, given = _operands(conv, norm)
    eps = argument(norm, "eps")

    weight_value = ctx.weights.value(present[0])
    assert weight_value is not None, present[0]
    dtype = weight_value.dtype

    def build(*tensors: Tensor) -> tuple[Tensor, ...]:
        rest = iter(tensors)
        operands: list[Any] = [next(rest).float() if has else None for has in given]
        w, b, gamma, beta, mean, var = operands
        scale = torch.rsqrt(var + eps) if gamma is None else gamma * torch.rsqrt(var + eps)
        shift = (0.0 if b is None else b) - mean
        shift = shift * scale if beta is None else shift * scale + beta
        folded = (w * scale.reshape(-1, *[1] * (w.dim() - 1))).to(dtype)
        return (folded, shift) if dtype == torch.float32 else (folded, shift.to(dtype), shift)

    names = [f"{conv.name}_{part}" for part in ("folded", "shift", "float_shift")]
    weight, bias, *exact = ctx.weights.derive(names[: 2 if dtype == torch.float32 else 3], present, build)
    if exact:
        ctx.float_bias[bias] = exact[0]
    new = call(norm, conv.target, conv.args[0], weight, bias, *conv.args[3:])
    new.meta["nn_module_stack"] = conv.meta.get("nn_module_stack")
    replace(norm, new)
    norm.graph.erase_node(conv)
