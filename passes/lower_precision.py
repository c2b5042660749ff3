"""Spell out what autocast does to layers with a constant weight, so that matches see the types that are computed.

    linear(x f32, w f32, b f32) -> bf16  =>  linear(to(x, bf16), w_bf16, b_bf16)          w_bf16 = w.to(bf16), packed once

Fires in inference, where a call's result is bfloat16 and its weight float32: that is autocast's doing. Everything else in
the graph stays autocast's. Our kernels take the bias as it was (``Context.float_bias``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..context import Context
from ..graph import aten, call, fake, is_call, mutation_between
from .match_conv import CONVOLUTIONS

_LAYERS = (*CONVOLUTIONS, aten.linear.default)  # x, weight, bias


def lower_precision(gm: GraphModule, ctx: Context) -> int:
    """Return the number of layers spelled out."""
    if not ctx.inference or "dense_reason" in ctx.extra:
        return 0
    changed = 0
    casts: dict[Node, Node] = {}
    for node in list(gm.graph.nodes):
        if is_call(node, *_LAYERS) and _lowered(node, ctx):
            operands: Any = node.args
            x, weight, *rest = operands
            node.update_arg(0, _cast(x, node, casts))
            node.update_arg(1, _constant(weight, ctx))
            if rest and isinstance(rest[0], Node):
                bias = rest[0]
                known = ctx.weights.value(bias) is not None
                node.update_arg(2, _constant(bias, ctx) if known else _cast(bias, node, casts))
                rounded: Any = node.args[2]
                ctx.float_bias[rounded] = bias
            changed += 1
    return changed


def _lowered(node: Node, ctx: Context) -> bool:
    result, weight = fake(node), ctx.weights.value(node.args[1])
    if result is None or weight is None or node.kwargs or not isinstance(node.args[0], Node):
        return False
    return result.dtype == torch.bfloat16 and weight.dtype == torch.float32


def _constant(node: Node, ctx: Context) -> Node:
    def build(value: Tensor) -> tuple[Tensor, ...]:
        return (value.to(torch.bfloat16),)

    return ctx.weights.derive((f"{node.name}_bf16",), (node,), build)[0]


def _cast(x: Node, user: Node, casts: dict[Node, Node]) -> Node:
    """Return ``x`` in bfloat16, cast once for all layers that read it."""
    value = fake(x)
    if value is not None and value.dtype == torch.bfloat16:
        return x
    if x not in casts or mutation_between(casts[x], user):
        casts[x] = call(user, aten.to.dtype, x, torch.bfloat16)
    return casts[x]
