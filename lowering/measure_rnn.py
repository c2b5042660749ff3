"""What one direction of a recurrent layer takes: calls that time ours and torch's, and a prediction from its two GEMMs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..context import Timing, Unit
from ..match import Match
from ..sparsity import tile
from ..sparsity.pattern import LayerMask

Weight = tuple[Match, LayerMask | None]
_STEP_US = 2.0  # a time step besides its product: waking the threads, the cell


def recurrent_calls(inputs: Weight, hidden: Weight, unit: Unit, steps: int, batch: int) -> list[Callable[[], Any]]:
    """Return ours and torch's call of one layer in one direction, biases and states included."""
    n, size = hidden[0].matrix_shape
    x = torch.randn(steps, batch, inputs[0].matrix_shape[1])
    state, bias = torch.zeros(batch, size), torch.zeros(n)
    lstm = n == 4 * size
    sparse = [_packed(weight, unit) for weight in (inputs, hidden)]
    dense = [weight.value.detach().contiguous() for weight, _ in (inputs, hidden)]

    def ours() -> Any:
        (w_ih, g_ih), (w_hh, g_hh) = sparse
        gates = torch.ops.fxprune.tile_gemm(x, *w_ih, bias, None, None, n, g_ih, -1, "none")
        cell, after = (state, None) if lstm else (None, bias)
        return torch.ops.fxprune.rnn_steps(gates, state, cell, *w_hh, after, g_hh, False)

    options = ([*dense, bias, bias], True, 1, 0.0, False, False, False)
    row = state[None]
    torchs = (lambda: torch.lstm(x, (row, row), *options)) if lstm else (lambda: torch.gru(x, row, *options))
    return [ours, torchs]


def _packed(weight: Weight, unit: Unit) -> tuple[list[Any], int]:
    match, mask = weight
    layer = mask or tile.keep_all(match.matrix_shape, unit.granularity)
    return tile.operands(match.value.detach(), layer.mask, layer.tiling), layer.tiling.granularity


def as_linear(weight: Weight) -> Weight:
    """Return a recurrent weight as the linear layer over the rows of all steps that it is but for their order."""
    return replace(weight[0], kind="linear", recurrent=None), weight[1]


def predicted(parts: Sequence[Timing], steps: int) -> Timing:
    """Return the time of a direction from the predictions of its weights as linear layers."""
    sparse, dense = (sum(times) + steps * _STEP_US for times in zip(*((p.sparse, p.dense) for p in parts), strict=True))
    return Timing(sparse, dense, dense, measured=False)
