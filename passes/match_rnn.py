"""Detect LSTM and GRU calls: one match per weight matrix, all of them on the call's node.

    lstm.input(x, [h0, c0], [w_ih, w_hh, b_ih, b_hh, ...])  ->  weight_ih_l0, weight_hh_l0, weight_ih_l0_reverse, ...

A call that cannot be matched is refused with its reason, which ``explain`` prints: projections, plain ``nn.RNN``,
dropout that is on, weights that are computed or written in the graph. Packed sequences are in no graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch.fx import GraphModule, Node

from ..context import Context, Refusal
from ..graph import argument, aten, is_call, mutates, name_of, shape
from ..match import Geometry, Match, Recurrent
from ..weights import qualified_name

_INPUT = (aten.lstm.input, aten.gru.input)
_PLAIN = (aten.rnn_tanh.input, aten.rnn_relu.input)
_CELLS = {"lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}


def match_rnn(gm: GraphModule, ctx: Context) -> int:
    """Append a match per weight of each LSTM or GRU call; returns 0, the graph is unchanged."""
    for node in gm.graph.nodes:
        if node.op == "call_function" and name_of(node) in _CELLS:
            _refuse_cell(node, ctx)
        if not is_call(node, *_INPUT, *_PLAIN):
            continue
        reason = _refusal(node, ctx)
        if reason is None:
            ctx.matches += list(_matches(node, ctx))
        else:
            text = "x".join(str(s) for s in shape(node.args[0]) or ())
            ctx.refused.append(Refusal(_name(node), "rnn", text, reason))
    return 0


def _refuse_cell(node: Node, ctx: Context) -> None:
    """Once per cell, however many steps call it."""
    name = qualified_name(node.args[2]).rpartition(".")[0] if isinstance(node.args[2], Node) else node.name
    reason = "a cell called step by step has no kernel; nn.LSTM and nn.GRU over a whole sequence have"
    text = "x".join(str(s) for s in shape(node.args[0]) or ())
    if all(r.name != name for r in ctx.refused):
        ctx.refused.append(Refusal(name, "rnn", text, reason))


def parameters(node: Node) -> tuple[list[Node], int]:
    """Return the parameters of a recurrent call, and how many each layer and direction has."""
    given: Any = argument(node, "params")
    groups = argument(node, "num_layers") * (2 if argument(node, "bidirectional") else 1)
    return list(given), len(given) // max(groups, 1)


def _refusal(node: Node, ctx: Context) -> str | None:
    if is_call(node, *_PLAIN):
        return "plain nn.RNN has no kernel, only LSTM and GRU have"
    given, each = parameters(node)
    if each != (4 if argument(node, "has_biases") else 2):
        return "projections (proj_size) have no kernel"
    between = argument(node, "num_layers") > 1 and argument(node, "dropout") != 0
    if argument(node, "train") is not False and between:
        return "dropout between its layers is on"
    if shape(node.args[0]) is None or any(not is_call(user, operator.getitem) for user in node.users):
        return "its inputs or results are not plain tensors"
    weights = [given[i + j] for i in range(0, len(given), each) for j in (0, 1)]
    if any(ctx.weights.value(w) is None for w in weights):
        return "its weights are not constants of this graph"
    if any(mutates(user) for w in weights for user in w.users):
        return "its weights are written in the graph"
    return None


def _name(node: Node) -> str:
    given: Any = argument(node, "params")
    return qualified_name(given[0]).rpartition(".")[0] or node.name


def _matches(node: Node, ctx: Context) -> Iterator[Match]:
    given, each = parameters(node)
    directions = 2 if argument(node, "bidirectional") else 1
    sizes = shape(node.args[0]) or ()
    steps, batch = sizes[:2][::-1] if argument(node, "batch_first") else sizes[:2]
    for position in range(0, len(given), each):
        for hidden in (False, True):
            weight = given[position + hidden]
            value = ctx.weights.value(weight)
            assert value is not None, weight
            parameter = qualified_name(ctx.weights.origin(weight))
            layer, direction = divmod(position // each, directions)
            yield Match(
                kind="rnn",
                node=node,
                operands=(0, None),
                weight=weight,
                name=parameter,
                parameter=parameter,
                value=value,
                geometry=Geometry((steps, batch, value.shape[1]), (steps, batch, value.shape[0])),
                recurrent=Recurrent(layer, direction, position, hidden),
            )
