"""Let the depthwise kernel of a GPU add up the planes that squeeze-and-excite takes the mean of, where that is faster.

    depthwise_taps -> mean(dim=[2, 3])  =>  y, mean = depthwise_pool

Fires in inference on CUDA, for means over the pixels in the type of the result.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..context import Context
from ..graph import aten, call, fake, is_call, replace
from .measure_fusion import Compare, Fill, comparer, wanted

_DEPTHWISE = torch.ops.fxprune.depthwise_taps.default
_POOL = torch.ops.fxprune.depthwise_pool.default
_MEAN = aten.mean.dim


def fuse_pool(gm: GraphModule, ctx: Context, compare: Compare | None = None) -> int:
    """Return the number of depthwise convolutions that pool. ``compare`` times both forms; by default on the GPU."""
    if not wanted(ctx):
        return 0
    compare = compare or comparer(ctx)
    fused = 0
    for node in list(gm.graph.nodes):
        value = fake(node) if is_call(node, _DEPTHWISE) else None
        if value is None or value.device.type != "cuda":
            continue
        means = [user for user in node.users if _is_plane_mean(user)]
        if means and _faster(node, means[0], ctx, compare):
            _replace(node, means)
            fused += 1
    return fused


def _is_plane_mean(node: Node) -> bool:
    if not is_call(node, _MEAN) or len(node.args) > 3 or node.kwargs:
        return False
    over: Any = node.args[1]
    return sorted(d % 4 for d in over) == [2, 3]


def _faster(node: Node, mean: Node, ctx: Context, compare: Compare) -> bool:
    def fused(fill: Fill) -> Any:
        return _POOL(*fill(node.args))

    def apart(fill: Fill) -> Any:
        return _MEAN(_DEPTHWISE(*fill(node.args)), *mean.args[1:])

    ours, theirs = compare(fused, apart, node.all_input_nodes)
    return ours * ctx.config.min_speedup <= theirs


def _replace(node: Node, means: list[Node]) -> None:
    both = call(node, _POOL, *node.args)
    both.meta["fxprune_impl"] = "cuda"
    y, pooled = (call(node, operator.getitem, both, i) for i in (0, 1))
    for mean in means:
        keeps = len(mean.args) > 2 and bool(mean.args[2])
        last = call(mean, aten.unsqueeze.default, call(mean, aten.unsqueeze.default, pooled, -1), -1) if keeps else pooled
        replace(mean, last)
    replace(node, y)
