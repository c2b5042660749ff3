"""Take a per-channel gate (squeeze-and-excite) into the GEMM that consumes it.

    tile_gemm(mul(x, gate[B, K, 1, 1]), w, feature_dim=1)  =>  tile_gemm(x, w, gate=gate[B, K])

Does not fire when the product has another user, or when the gate is not one number per image and channel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..context import Context
from ..graph import aten, call, is_call, mutation_between, same_dtype, same_shape, shape, sole_user

_X, _GATE, _FEATURE_DIM = 0, 7, 10


def fuse_gate(gm: GraphModule, ctx: Context) -> int:
    """Return the number of gates fused."""
    fused = 0
    for node in list(gm.graph.nodes):
        if is_call(node, torch.ops.fxprune.tile_gemm.default) and ctx.inference:
            fused += _fuse(node)
    return fused


def _fuse(node: Node) -> bool:
    product = node.args[_X]
    if node.args[_FEATURE_DIM] != 1 or node.args[_GATE] is not None:
        return False
    if not is_call(product, aten.mul.Tensor) or sole_user(product) is not node or mutation_between(product, node):
        return False
    for x, gate in (product.args, product.args[::-1]):
        if same_shape(x, product) and same_dtype(x, gate) and _per_channel(gate, product):
            flat = call(node, aten.flatten.using_ints, gate, 1)
            node.update_arg(_X, x)
            node.update_arg(_GATE, flat)
            node.graph.erase_node(product)
            return True
    return False


def _per_channel(gate: Any, product: Node) -> bool:
    have, want = shape(gate), shape(product)
    if have is None or want is None or len(have) != len(want):
        return False
    ones = all(statically_known_true(s == 1) for s in have[2:])
    return ones and all(statically_known_true(a == b) for a, b in zip(have[:2], want[:2], strict=True))
