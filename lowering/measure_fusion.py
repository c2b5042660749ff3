"""Time two forms of one part of a graph at its shapes: weights as they are, activations random."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..context import Context
from ..cost import hint
from ..graph import fake
from .measure import ROUNDS, interleave

# replaces the nodes in arguments by tensors
Fill = Callable[[Any], Any]
Form = Callable[[Fill], Any]
# (fused, apart, nodes that they read) -> microseconds of each
Compare = Callable[[Form, Form, Iterable[Node]], tuple[float, float]]


def comparer(ctx: Context) -> Compare:
    """Return a function that times both forms on the device of their nodes."""

    def compare(fused: Form, apart: Form, nodes: Iterable[Node]) -> tuple[float, float]:
        with torch.inference_mode():
            real = {n: _value(n, ctx) for n in nodes}

            def fill(given: Any) -> Any:
                return torch.fx.map_arg(given, lambda n: real[n])

            micros, _ = interleave([lambda: fused(fill), lambda: apart(fill)], ROUNDS[ctx.config.autotune])
        return micros[0], micros[1]

    return compare


def wanted(ctx: Context) -> bool:
    """True where fusing may be measured: inference, with timing allowed."""
    return ctx.inference and ctx.config.autotune != "off"


def _value(node: Node, ctx: Context) -> Tensor:
    known = ctx.weights.value(node)
    if known is not None:
        return known.detach()
    value = fake(node)
    if value is None:
        raise ValueError(f"{node} is no tensor")
    return torch.randn([hint(s) for s in value.shape], dtype=value.dtype, device=value.device)
