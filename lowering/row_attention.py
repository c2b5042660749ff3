"""Run attention in float32 on the CPU by ``fxprune::attention_rows``, where that is measured faster.

    scaled_dot_product_attention(q, k, v, mask)  =>  attention_rows -> transpose

Fires in inference, beside layers that run sparse: without dropout, with one number of heads and one size of them, and with a
mask of four dimensions (booleans or float32) or none. Causal attention stays: torch's kernel skips half of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..context import Context
from ..cost import hint
from ..graph import aten, call, equal_sizes, fake, replace, shape
from . import library, sdpa
from .measure_fusion import Compare, Fill, comparer, wanted

_ROWS = torch.ops.fxprune.attention_rows.default


def row_attention(gm: GraphModule, ctx: Context, compare: Compare | None = None) -> int:
    """Return the number of attentions replaced. ``compare`` times both forms; by default on this machine."""
    if not wanted(ctx) or not library.available():
        return 0
    compare = compare or comparer(ctx)
    faster: dict[tuple[Any, ...], bool] = {}  # by sizes: layers of a model are alike
    added: dict[Node, Node] = {}  # masks, of which layers of a model share one
    done = 0
    for node in list(gm.graph.nodes):
        if (given := _given(node)) is None:
            continue
        q, k, v, mask, scale = given
        sizes = tuple(hint(s) for n in (q, k) for s in shape(n) or ())
        if sizes not in faster:
            faster[sizes] = _faster(node, (q, k, v), scale, ctx, compare)
        if not faster[sizes]:
            continue
        if mask is not None and mask not in added:
            added[mask] = sdpa.added(node, mask)
        rows = call(node, _ROWS, q, k, v, None if mask is None else added[mask], scale)
        rows.meta["fxprune_impl"] = "cpu"
        replace(node, call(node, aten.transpose.int, rows, 1, 2))
        done += 1
    return done


def _given(node: Node) -> tuple[Node, Node, Node, Node | None, float] | None:
    """Return q, k, v, mask and scale of an attention that the operator computes."""
    found = sdpa.given(node)
    if found is None:
        return None
    q, k, v, mask, _ = found
    values = [fake(n) for n in (q, k, v)]
    if any(t is None or t.dim() != 4 or t.dtype != torch.float32 or t.device.type != "cpu" for t in values):
        return None
    queries, keys = shape(q) or (), shape(k) or ()
    alike = equal_sizes(keys, shape(v)) and equal_sizes([*queries[:2], queries[3]], [*keys[:2], keys[3]])
    return found if alike and (mask is None or _is_added(mask, queries, keys)) else None


def _is_added(mask: Any, q: tuple[Any, ...], k: tuple[Any, ...]) -> bool:
    """A mask (B or 1, H or 1, queries or 1, keys), of booleans or to be added."""
    value = fake(mask)
    if value is None or value.dim() != 4 or value.dtype not in (torch.bool, torch.float32):
        return False
    outer = all(equal_sizes([a], [b]) or equal_sizes([a], [1]) for a, b in zip(value.shape[:3], q[:3], strict=True))
    return outer and equal_sizes(value.shape[3:], k[2:3])


def _faster(node: Node, operands: tuple[Node, ...], scale: float, ctx: Context, compare: Compare) -> bool:
    def ours(fill: Fill) -> Any:
        return _ROWS(*fill(operands), None, scale)

    def theirs(fill: Fill) -> Any:
        q, k, v = fill(operands)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

    new, old = compare(ours, theirs, operands)
    return new * ctx.config.min_speedup <= old
