"""Let a reshape read any layout: ``x.view(sizes)`` addresses x's memory, ``reshape(x, sizes)`` its elements.

    x.view(b, -1), aten.view(x, sizes), x.view_as(y)  =>  aten.reshape(x, sizes)

Where memory is laid out as sizes ask, both are the same view. Our kernels' results are contiguous where eager's may be
channels-last, and then only a reshape finds the same elements. A reshape that has to copy is no alias any more, so a graph
that writes to any tensor keeps its views.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..context import Context
from ..graph import aten, example, fake, is_call, mutates, replace, shape


def relax_views(gm: GraphModule, ctx: Context) -> int:
    """Return the number of views that became reshapes."""
    if any(map(mutates, gm.graph.nodes)):
        return 0
    changed = 0
    for node in list(gm.graph.nodes):
        sizes = _sizes(node)
        if sizes is not None:
            with gm.graph.inserting_before(node):
                new = gm.graph.call_function(aten.reshape.default, (node.args[0], sizes))
            new.meta = dict(node.meta)
            replace(node, new)
            changed += 1
    return changed


def _sizes(node: Node) -> list[Any] | None:
    """Return what a view asks for; ``None`` for another node and for a view as another dtype."""
    if node.op == "call_method" and node.target == "view_as":
        sizes = list(shape(node.args[1]) or ())
        return sizes if all(isinstance(s, int) for s in sizes) else None
    if not is_call(node, aten.view.default) and not (node.op == "call_method" and node.target == "view"):
        return None
    given = node.args[1:]
    sizes = list(given[0]) if len(given) == 1 and isinstance(given[0], (tuple, list)) else list(given)
    known = fake(node.args[0]) is not None and not node.kwargs
    return sizes if known and sizes and all(map(_is_size, sizes)) else None


def _is_size(value: Any) -> bool:
    if isinstance(value, Node):
        value = example(value)
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
