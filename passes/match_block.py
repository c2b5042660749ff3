"""Detect depthwise-separable blocks over the matched layers.

    [PW1 -> [BN] -> [act] ->] DW -> [BN] -> [act] -> [* gate] -> PW2 [-> BN] [+ skip]

Every value between two convolutions must feed nothing else, but for the gate's own squeeze branch.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from ..context import Context
from ..graph import aten, is_call, same_shape, sole_user
from ..match import Block, Match

_POINTWISE = (
    aten.batch_norm.default,
    aten.relu.default,
    aten.hardtanh.default,
    aten.silu.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.gelu.default,
)


def match_blocks(gm: GraphModule, ctx: Context) -> int:
    """Append a block per depthwise convolution followed by a 1x1; returns 0, the graph is unchanged."""
    by_node = {m.node: m for m in ctx.matches}
    for match in ctx.matches:
        if match.kind == "depthwise":
            block = _block(match, by_node)
            if block is not None:
                ctx.blocks.append(block)
    return 0


def _block(depthwise: Match, by_node: dict[Node, Match]) -> Block | None:
    end, gated = _forward(depthwise.node)
    project = by_node.get(end) if end is not None else None
    if project is None or project.kind != "pointwise":
        return None
    return Block(depthwise, project, _expand(depthwise, by_node), gated, _residual(project.node))


def _forward(node: Node) -> tuple[Node | None, bool]:
    """Follow the chain behind a depthwise convolution to the next convolution."""
    gated = False
    while True:
        user = sole_user(node)
        if user is None and not gated:
            user = _gate(node)
            gated = user is not None
        elif user is not None and is_call(user, aten.mul.Tensor) and not gated:
            gated = True
        if user is None:
            return None, gated
        if is_call(user, aten.conv2d.default):
            return (user if user.args[0] is node else None), gated
        if not is_call(user, *_POINTWISE, aten.mul.Tensor):
            return None, gated
        node = user


def _gate(node: Node) -> Node | None:
    """Return the multiplication that gates ``node`` when it also feeds a squeeze branch."""
    muls = [u for u in node.users if is_call(u, aten.mul.Tensor) and same_shape(u, node)]
    return muls[0] if len(node.users) == 2 and len(muls) == 1 else None


def _expand(depthwise: Match, by_node: dict[Node, Match]) -> Match | None:
    node: Argument = depthwise.x
    while isinstance(node, Node) and sole_user(node) is not None:
        match = by_node.get(node)
        if match is not None:
            return match if match.kind == "pointwise" else None
        if not is_call(node, *_POINTWISE):
            return None
        node = node.args[0]
    return None


def _residual(node: Node) -> bool:
    user = sole_user(node)
    while user is not None and is_call(user, aten.batch_norm.default):
        node, user = user, sole_user(user)
    return user is not None and is_call(user, aten.add.Tensor) and same_shape(user, node)
