"""Fold a weight that is computed from parameters and buffers alone: masks left in place, weight norm, casts, joined weights.

    linear(x, weight_orig * weight_mask)  =>  linear(x, folded)          torch.nn.utils.prune, torch.ao.pruning
    conv2d(x, _weight_norm(v, g))         =>  conv2d(x, folded)          torch.nn.utils.weight_norm
    linear(x, cat([wq, wk, wv]))          =>  linear(x, folded)          attention that joins its projections

Only in inference: in training the parameters behind it are what learns. The folded tensor remembers what it was built
from, so new values and new masks are seen; it stands for the parameter of its shape, and a joined one for none. Never
where the graph writes one of them, nor for anything random.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..context import Context
from ..graph import TRANSPOSES, aten, fake, is_call, mutates, name_of
from ..weights import STATE_NAME, qualified_name

_PURE = {"mul", "div", "add", "sub", "to", "float", "type_as", "where", "masked_fill", "_weight_norm", "detach"}
_PURE |= {"contiguous", "clone", "abs", "norm", "rsqrt", "norm_except_dim", "_weight_norm_interface", "cat", "concat"}
_OPERAND: dict[Any, int] = {  # position of a weight
    aten.conv2d.default: 1,
    aten.conv2d.padding: 1,
    aten.conv1d.default: 1,
    aten.conv1d.padding: 1,
    aten.linear.default: 1,
    aten.mm.default: 1,
    aten.matmul.default: 1,
    aten.addmm.default: 2,
}


def fold_weights(gm: GraphModule, ctx: Context) -> int:
    """Return the number of weights folded."""
    if not ctx.inference:
        return 0
    folded: dict[Node, Node] = {}
    for node in list(gm.graph.nodes):
        if not is_call(node, *_OPERAND) or len(node.args) <= _OPERAND[node.target]:
            continue
        user: Node = node
        operand: Any = node.args[_OPERAND[node.target]]
        while is_call(operand, *TRANSPOSES):
            user, operand = operand, operand.args[0]
        if operand not in folded:
            steps = _expression(operand, ctx)
            if not steps:
                continue
            folded[operand] = _fold(operand, steps, ctx)
        user.replace_input_with(operand, folded[operand])
    if folded:
        gm.graph.eliminate_dead_code(is_impure_node=lambda n: n not in folded or bool(n.users))
    return len(folded)


def _expression(operand: Any, ctx: Context) -> list[Node]:
    """Return the calls that compute ``operand``, in order; none unless all of them are pure and all leaves constant."""
    steps: list[Node] = []
    seen: set[Node] = set()

    def visit(node: Node) -> bool:
        if node in seen:
            return True
        seen.add(node)
        if ctx.weights.value(node) is not None:
            return not any(mutates(user) for user in node.users)
        if node.op not in ("call_function", "call_method") or name_of(node) not in _PURE or mutates(node):
            return False
        ok = bool(node.all_input_nodes) and all(visit(source) for source in node.all_input_nodes)
        steps.append(node)
        return ok

    constant = isinstance(operand, Node) and fake(operand) is not None and visit(operand)
    return steps if constant else []


def _fold(operand: Node, steps: list[Node], ctx: Context) -> Node:
    leaves = {source: None for step in steps for source in step.all_input_nodes if ctx.weights.value(source) is not None}
    shape = getattr(fake(operand), "shape", None)

    def rank(leaf: Node) -> bool:
        value = ctx.weights.value(leaf)
        return not (isinstance(value, torch.nn.Parameter) and value.shape == shape)

    inputs = sorted(leaves, key=rank)  # the parameter that the result stands for comes first
    joined = rank(inputs[0])

    given = [(step.args, step.kwargs) for step in steps]  # a node that leaves the graph loses them

    def build(*tensors: Tensor) -> tuple[Tensor, ...]:
        values: dict[Node, Any] = dict(zip(inputs, tensors, strict=True))
        for step, operands in zip(steps, given, strict=True):
            args, kwargs = torch.fx.map_arg(operands, values.__getitem__)
            if step.op == "call_method":
                values[step] = getattr(args[0], str(step.target))(*args[1:], **kwargs)
            else:
                values[step] = step.target(*args, **kwargs)  # type: ignore[operator]
        return (values[operand],)

    (node,) = ctx.weights.derive((f"{operand.name}_folded",), inputs, build, own=joined)
    if joined:
        owners = [qualified_name(leaf).rpartition(".") for leaf in inputs]
        node.meta[STATE_NAME] = " + ".join(owner or name for owner, _, name in owners) + ".weight"
    return node
