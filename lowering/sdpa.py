"""What a call of ``scaled_dot_product_attention`` is given, for the passes that run it by operators of ours."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from ..graph import aten, call, fake, name_of, shape

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def given(node: Node) -> tuple[Node, Node, Node, Any, float] | None:
    """Return q, k, v (four dimensions), mask and scale of an attention; ``None`` for other nodes, and for one with dropout,
    causal, of grouped queries, of a symbolic size of heads, or of a scale that is no number above 0."""
    if node.op != "call_function" or name_of(node) != "scaled_dot_product_attention":
        return None
    by_name: dict[str, Any] = {**dict(zip(_NAMES, node.args, strict=False)), **node.kwargs}
    if by_name.get("dropout_p", 0.0) != 0.0 or by_name.get("is_causal", False) or by_name.get("enable_gqa", False):
        return None
    q, k, v, mask, scale = (by_name.get(name) for name in ("query", "key", "value", "attn_mask", "scale"))
    sizes = shape(q) or ()
    if not (isinstance(q, Node) and isinstance(k, Node) and isinstance(v, Node)) or len(sizes) != 4:
        return None
    if not isinstance(sizes[3], int):
        return None
    scale = 1.0 / math.sqrt(sizes[3]) if scale is None else scale
    return (q, k, v, mask, scale) if isinstance(scale, float) and scale > 0 else None


def added(anchor: Node, mask: Node) -> Node:
    """Return a mask to be added: one of booleans as 0 and -inf in float32, another one as it is."""
    value = fake(mask)
    boolean = value is not None and value.dtype == torch.bool
    return call(anchor, aten.where.Scalar, mask, 0.0, -math.inf) if boolean else mask
