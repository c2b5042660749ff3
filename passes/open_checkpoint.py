"""Open ``torch.utils.checkpoint`` in inference: nothing is recomputed there, and its body is a graph no pass reads.

    tag_activation_checkpoint(body, x, weight, ...)  =>  the calls of ``body``

While gradients are needed the call stays as it is: opened, it would keep what it is there to forget.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from ..context import Context
from ..graph import is_call

_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def open_checkpoint(gm: GraphModule, ctx: Context) -> int:
    """Return the number of calls opened, those inside of others included."""
    opened = 0
    while ctx.inference and (node := next((n for n in gm.graph.nodes if _opens(gm, n)), None)) is not None:
        _open(gm, node)
        opened += 1
    return opened


def _opens(gm: GraphModule, node: Node) -> bool:
    if not is_call(node, _CHECKPOINT) or not isinstance(body := _body(gm, node), GraphModule):
        return False
    _, keywords = _CHECKPOINT.divide_kwargs(node.kwargs)  # type: ignore[attr-defined]
    parts = all(is_call(user, operator.getitem) for user in node.users)
    inputs = sum(n.op == "placeholder" for n in body.graph.nodes)
    return parts and not keywords and inputs == len(node.args) - 1


def _body(gm: GraphModule, node: Node) -> object:
    return getattr(gm, str(node.args[0].target), None) if isinstance(node.args[0], Node) else None


def _open(gm: GraphModule, node: Node) -> None:
    body = _body(gm, node)
    assert isinstance(body, GraphModule) and isinstance(node.args[0], Node)
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    inner = dict(zip(placeholders, node.args[1:], strict=True))
    with gm.graph.inserting_before(node):
        for part in [n for n in body.graph.nodes if n.op == "get_attr"]:
            name = f"{node.name}_{part.target}".replace(".", "_")
            setattr(gm, name, operator.attrgetter(str(part.target))(body))
            inner[part] = gm.graph.get_attr(name)
            inner[part].meta = dict(part.meta)
        results = gm.graph.graph_copy(body.graph, val_map=inner)  # type: ignore[arg-type]
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index, call-overload, arg-type]
        gm.graph.erase_node(user)
    whole = node.args[0]
    gm.graph.erase_node(node)
    if not whole.users:
        gm.graph.erase_node(whole)
