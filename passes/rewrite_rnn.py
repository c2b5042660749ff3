"""Rewrite the chosen layers of an LSTM or GRU call; the others stay torch's own call, one layer each.

    lstm.input(x, [h0, c0], [w_ih, w_hh, b_ih, b_hh])
        =>  gates = tile_gemm(x, w_ih packed, b_ih + b_hh)         (T, B, 4H), every step at once
            out, h_n, c_n = rnn_steps(gates, h0, c0, w_hh packed)  for each direction, then cat

Only outside training: ``rnn_steps`` has no gradient. A GRU adds b_hh inside the step, where the reset gate acts on it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..context import Context, Decision
from ..graph import argument, aten, call, is_call, replace
from ..sparsity import tile
from .match_rnn import parameters
from .rewrite_gemm import packed

_GEMM, _STEPS = torch.ops.fxprune.tile_gemm.default, torch.ops.fxprune.rnn_steps.default


def rewrite_rnn(gm: GraphModule, ctx: Context) -> int:
    """Return the number of layers rewritten."""
    rewritten = 0
    for node in list(dict.fromkeys(d.match.node for d in ctx.decisions if d.chosen and d.match.kind == "rnn")):
        mine = [(d.match.recurrent, d) for d in ctx.decisions if d.chosen and d.match.node is node]
        rewritten += _Call(node, ctx).rewrite({r.position + r.hidden: d for r, d in mine if r is not None})
    return rewritten


class _Call:
    """One recurrent call while its layers are written down in front of it."""

    def __init__(self, node: Node, ctx: Context) -> None:
        self.node, self.ctx = node, ctx
        self.params, self.each = parameters(node)
        self.layers: int = argument(node, "num_layers")
        self.directions = 2 if argument(node, "bidirectional") else 1
        self.lstm = is_call(node, aten.lstm.input)
        given: Any = argument(node, "hx")
        self.states: list[Node] = list(given) if self.lstm else [given]

    def rewrite(self, chosen: dict[int, Decision]) -> int:
        """Replace the call; ``chosen`` is by position in the parameter list. Returns the number of layers of ours."""
        batch_first = argument(self.node, "batch_first")
        x: Any = self.node.args[0]
        x = self._add(aten.transpose.int, x, 0, 1) if batch_first else x
        finals: list[list[Node]] = [[] for _ in self.states]
        ours = 0
        for layer in range(self.layers):
            first = layer * self.directions * self.each
            if first in chosen:
                x, states = self._ours(x, layer, chosen)
                ours += 1
            else:
                x, *states = self._torchs(x, layer)
            for final, state in zip(finals, states, strict=True):
                final.append(state)
        x = self._add(aten.transpose.int, x, 0, 1) if batch_first else x
        results = [x, *(self._joined(parts, 0) for parts in finals)]
        for user in list(self.node.users):
            replace(user, results[user.args[1]])  # type: ignore[index]
        self.node.graph.erase_node(self.node)
        for result in reversed(results):
            if not result.users and result is not x:
                result.graph.erase_node(result)
        return ours

    def _ours(self, x: Node, layer: int, chosen: dict[int, Decision]) -> tuple[Node, list[Node]]:
        outs: list[Node] = []
        states: list[list[Node]] = [[] for _ in self.states]
        for direction in range(self.directions):
            row = layer * self.directions + direction
            outs_and_states = self._steps(x, row, chosen[row * self.each], chosen[row * self.each + 1])
            outs.append(outs_and_states[0])
            for parts, state in zip(states, outs_and_states[1:], strict=True):
                parts.append(self._add(aten.unsqueeze.default, state, 0))
        return self._joined(outs, 2), [self._joined(parts, 0) for parts in states]

    def _steps(self, x: Node, row: int, inputs: Decision, hidden: Decision) -> list[Node]:
        layers = [d.mask or tile.keep_all(d.match.matrix_shape, self._granularity()) for d in (inputs, hidden)]
        weights = [
            packed(d.match, layer, self.ctx, f"{self.node.name}_{row}_{'hh' if d is hidden else 'ih'}")
            for d, layer in zip((inputs, hidden), layers, strict=True)
        ]
        n = inputs.match.matrix_shape[0]
        biases: list[Any] = self.params[row * self.each + 2 : (row + 1) * self.each] or [None, None]
        before, after = (self._add(aten.add.Tensor, *biases), None) if self.lstm and biases[0] else biases
        gates = self._add(_GEMM, x, *weights[0], before, None, None, n, layers[0].tiling.granularity, -1, "none")
        states: list[Any] = [self._add(aten.select.int, s, 0, row) for s in self.states]
        states += [] if self.lstm else [None]
        backwards = row % self.directions == 1
        steps = self._add(_STEPS, gates, *states, *weights[1], after, layers[1].tiling.granularity, backwards)
        return [self._add(operator.getitem, steps, i) for i in range(3 if self.lstm else 2)]

    def _torchs(self, x: Node, layer: int) -> list[Node]:
        start, end = layer * self.directions, (layer + 1) * self.directions
        states: Any = [self._add(aten.slice.Tensor, s, 0, start, end) for s in self.states]
        params = self.params[start * self.each : end * self.each]
        biased, bidirectional = self.each == 4, self.directions == 2
        operands = (x, states if self.lstm else states[0], params, biased, 1, 0.0, False, bidirectional, False)
        result = self._add(self.node.target, *operands)
        return [self._add(operator.getitem, result, i) for i in range(3 if self.lstm else 2)]

    def _joined(self, parts: list[Node], dim: int) -> Node:
        return parts[0] if len(parts) == 1 else self._add(aten.cat.default, parts, dim)

    def _granularity(self) -> int:
        return self.ctx.kernels.unit("rnn").granularity

    def _add(self, target: Any, *args: Any) -> Node:
        return call(self.node, target, *args)
