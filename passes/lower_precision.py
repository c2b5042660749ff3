"""Spell out what autocast does to layers with a constant weight, so that matches see the types that are computed.

    linear(x f32, w f32, b f32) -> bf16  =>  linear(to(x, bf16), w_bf16, b_bf16)          w_bf16 = w.to(bf16), packed once
    matmul(x f32, t(w f32))     -> bf16  =>  matmul(to(x, bf16), t(w_bf16))

Fires in inference, where a call's result is bfloat16 and its weight float32: that is autocast's doing. Everything else in
the graph stays autocast's. Our kernels take the bias as it was (``Context.float_bias``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..context import Context
from ..graph import TRANSPOSES, aten, call, fake, is_call, mutation_between
from .match_conv import CONVOLUTIONS

# positions of x, weight and bias
_LAYERS: dict[Any, tuple[int, int, int | None]] = {
    **dict.fromkeys((*CONVOLUTIONS, aten.linear.default), (0, 1, 2)),
    **dict.fromkeys((aten.mm.default, aten.matmul.default), (0, 1, None)),
    aten.addmm.default: (1, 2, 0),
}


def lower_precision(gm: GraphModule, ctx: Context) -> int:
    """Return the number of layers spelled out."""
    if not ctx.inference or "dense_reason" in ctx.extra:
        return 0
    changed = 0
    casts: dict[Node, Node] = {}
    for node in list(gm.graph.nodes):
        if is_call(node, *_LAYERS) and _lowered(node, ctx):
            x, weight, bias = _LAYERS[node.target]
            operands: Any = node.args
            node.update_arg(x, _cast(operands[x], node, casts))
            node.update_arg(weight, _weight(operands[weight], node, ctx))
            if bias is not None and bias < len(operands) and isinstance(operands[bias], Node):
                _lower_bias(node, bias, operands[bias], casts, ctx)
            changed += 1
    return changed


def _lower_bias(node: Node, position: int, bias: Node, casts: dict[Node, Node], ctx: Context) -> None:
    rounded = _cast(bias, node, casts) if ctx.weights.value(bias) is None else _constant(bias, ctx)
    node.update_arg(position, rounded)
    ctx.float_bias[rounded] = bias


def _lowered(node: Node, ctx: Context) -> bool:
    x, weight, _ = _LAYERS[node.target]
    result, value = fake(node), ctx.weights.value(_stored(node.args[weight]))
    if result is None or value is None or node.kwargs or not isinstance(node.args[x], Node):
        return False
    return result.dtype == torch.bfloat16 and value.dtype == torch.float32


def _stored(operand: Any) -> Any:
    """Look through a transpose of a weight."""
    return operand.args[0] if is_call(operand, *TRANSPOSES) else operand


def _weight(operand: Any, user: Node, ctx: Context) -> Node:
    lowered = _constant(_stored(operand), ctx)
    return call(user, operand.target, lowered, *operand.args[1:]) if is_call(operand, *TRANSPOSES) else lowered


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
