"""Fold a constant scale per output feature into the layer in front of it (layer scale of ConvNeXt, CaiT and others).

    mul(linear(x, w, b), gamma)                =>  linear(x, w * gamma[:, None], b * gamma)
    mul(permute(linear(x, w, b)), gamma)       =>  permute(linear(x, ...))     where gamma still runs along the features
    mul(conv2d(x, w, b), gamma)                =>  conv2d(x, ...)

Fires outside training, for constant tensors of one type, float32 or bfloat16; nothing else may read the layer's result.
Its products then keep their residual add, and with it their chain. In bfloat16 scaled weights are rounded once, where the
layer's result and the product of it were. Under autocast a bfloat16 layer times a float32 scale is float32, and stays so.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..context import Context
from ..graph import argument, aten, call, fake, is_call, mutation_between, name_of, replace, shape, sole_user
from .match_conv import CONVOLUTIONS

_VIEWS = ("reshape", "view", "unsqueeze")
_TYPES = {torch.float32, torch.bfloat16}


def fold_scale(gm: GraphModule, ctx: Context) -> int:
    """Return the number of scales folded."""
    if not ctx.inference:
        return 0
    folded = 0
    for node in list(gm.graph.nodes):
        if not is_call(node, aten.mul.Tensor) or node.kwargs:
            continue
        for value, scale in (node.args, reversed(node.args)):
            found = _layer(value)
            if found is not None and _fold(*found, scale, node, ctx):
                folded += 1
                break
    return folded


def _layer(value: Any) -> tuple[Node, Node | None, int] | None:
    """Return (layer, permute of its result or None, dimension of the output features)."""
    permute = value if is_call(value, aten.permute.default) else None
    layer = value if permute is None else permute.args[0]
    rank = len(shape(value) or ())
    if not is_call(layer, aten.linear.default, *CONVOLUTIONS) or (permute is not None and sole_user(layer) is not permute):
        return None
    features = rank - 1 if is_call(layer, aten.linear.default) else rank - len(argument(layer, "stride")) - 1
    if permute is not None:
        features = [d % rank for d in argument(permute, "dims")].index(features)
    return layer, permute, features


def _fold(layer: Node, permute: Node | None, features: int, scale: Any, product: Node, ctx: Context) -> bool:
    sizes, result = shape(scale), shape(product)
    last = layer if permute is None else permute
    if sizes is None or result is None or sole_user(last) is not product or mutation_between(layer, product):
        return False
    aligned = [*[1] * (len(result) - len(sizes)), *sizes]
    along = [d for d, size in enumerate(aligned) if size != 1]
    source = scale
    while isinstance(source, Node) and source.op in ("call_function", "call_method") and name_of(source) in _VIEWS:
        source = source.args[0]
    weight, bias = argument(layer, "weight"), argument(layer, "bias")
    operands = [n for n in (weight, bias, source) if n is not None]
    tensors = [ctx.weights.value(n) for n in operands]
    types = {None if t is None else t.dtype for t in tensors}
    count = (shape(weight) or (0,))[0]
    if len(aligned) != len(result) or along not in ([features], []) or len(types) != 1 or not types <= _TYPES:
        return False
    if aligned[features] != count:  # one number for all, or a single feature: no scale per feature
        return False

    def build(w: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        gamma = rest[-1].reshape(-1)
        scaled = w * gamma.reshape(-1, *[1] * (w.dim() - 1))
        return (scaled, rest[0] * gamma) if bias is not None else (scaled,)

    names = [f"{layer.name}_{part}" for part in ("scaled", "scaled_bias")][: 1 + (bias is not None)]
    derived = ctx.weights.derive(names, operands, build)
    layer.update_arg(1, derived[0])
    if bias is not None:
        layer.update_arg(2, derived[1])
    computed, wanted = fake(last), fake(product)
    if computed is not None and wanted is not None and computed.dtype != wanted.dtype:
        last = call(product, aten.to.dtype, last, wanted.dtype)
    replace(product, last)
    return True
