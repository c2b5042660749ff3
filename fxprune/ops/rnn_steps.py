"""``fxprune::rnn_steps``: the recurrence of one layer and direction of an LSTM or a GRU. For inference.

    LSTM (c given), gates i, f, g, o:   p = gates[t] + w_hh h + bias;   c = sigmoid(p_f) c + sigmoid(p_i) tanh(p_g)
                                        h = sigmoid(p_o) tanh(c)
    GRU (no c), gates r, z, n:          q = w_hh h + bias;   r, z = sigmoid(gates[t] + q)_{r,z}
                                        h = (1 - z) tanh(gates[t]_n + r q_n) + z h

``gates`` holds the products with the inputs of all steps, so what is left per step is one small GEMM with the tile-packed
recurrent weight (values, index, tile_ptr, columns) and the cell. ``reverse`` runs from the last step to the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxprune.ops import tile_pack
from fxprune.ops.operator import Args, Operator


def reference(
    gates: Tensor,
    h: Tensor,
    c: Tensor | None,
    values: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    granularity: int,
    reverse: bool,
) -> list[Tensor]:
    """gates: (T, B, 4H or 3H); h, c: (B, H); returns out (T, B, H), h_n and, for an LSTM, c_n."""
    hidden = h.shape[1]
    weight = tile_pack.unpack_reference(values, index, tile_ptr, columns, granularity, gates.shape[2], hidden)
    outs = [h] * gates.shape[0]
    steps = range(gates.shape[0])
    for t in reversed(steps) if reverse else steps:
        sums = h @ weight.t() if bias is None else h @ weight.t() + bias
        if c is not None:
            i, f, g, o = (gates[t] + sums).split(hidden, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            r, z, n = gates[t].split(hidden, 1)
            sum_r, sum_z, sum_n = sums.split(hidden, 1)
            z = (z + sum_z).sigmoid()
            h = (1 - z) * (n + (r + sum_r).sigmoid() * sum_n).tanh() + z * h
        outs[t] = h
    out = torch.stack(outs) if outs else gates.new_zeros((0, *h.shape))
    return [out, h.clone()] if c is None else [out, h.clone(), c.clone()]


def fake(
    gates: Tensor,
    h: Tensor,
    c: Tensor | None,
    values: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    granularity: int,
    reverse: bool,
) -> list[Tensor]:
    states = [h.new_empty(h.shape) for _ in range(1 if c is None else 2)]
    return [gates.new_empty((gates.shape[0], *h.shape)), *states]


def setup_context(ctx: Any, inputs: Args, output: list[Tensor]) -> None:
    return None


def backward(ctx: Any, *grads: Tensor) -> Args:
    """Refuse: a training graph keeps torch's own call."""
    raise RuntimeError(
        "fxprune::rnn_steps has no gradient: recurrent layers are rewritten for inference only. Compile with gradients "
        "enabled."
    )


def _sample(steps: int, batch: int, hidden: int, granularity: int, lstm: bool, extras: str = "") -> Args:
    gen = torch.Generator().manual_seed(steps * 31 + batch * 7 + hidden)
    n = (4 if lstm else 3) * hidden
    packed = tile_pack.random_structure(n, hidden, granularity, gen)
    if "a" in extras:  # every output feature is kept, so that no tile straddles two gates
        packed = (torch.randn(n * hidden, generator=gen), *tile_pack.whole_structure(n, hidden, granularity))
    gates = torch.randn(steps, batch, n, generator=gen)
    h, c = (torch.randn(batch, hidden, generator=gen) for _ in range(2))
    bias = torch.randn(n, generator=gen) if "b" in extras else None
    return gates, h, c if lstm else None, *packed, bias, granularity, "r" in extras


def samples() -> Iterator[Args]:
    yield _sample(3, 2, 5, 4, True)
    yield _sample(1, 1, 1, 64, True, "br")
    yield _sample(4, 13, 7, 8, True, "r")
    yield _sample(2, 3, 64, 64, True, "a")
    yield _sample(3, 2, 6, 4, False, "b")
    yield _sample(5, 1, 9, 64, False, "r")
    yield _sample(2, 4, 32, 16, False, "abr")


def bad_samples() -> Iterator[tuple[Args, str]]:
    good = list(next(samples()))

    def broken(position: int, value: Any) -> Args:
        return tuple(value if i == position else a for i, a in enumerate(good))

    yield broken(0, good[0].double()), r"float32"
    yield broken(0, good[0][0]), r"gates"
    yield broken(0, good[0][:, :, :15]), r"gates"
    yield broken(1, good[1][0]), r"h must"
    yield broken(2, None), r"gates"
    yield broken(2, good[2][:1]), r"c must"
    yield broken(3, good[3][:-1]), r"values"
    yield broken(4, good[4] + 100), r"index"
    yield broken(5, good[5] + 1), r"tile_ptr"
    yield broken(6, good[6] + 100), r"columns"
    yield broken(7, torch.zeros(3)), r"bias"
    yield broken(8, 0), r"granularity"


OPERATOR = Operator("rnn_steps", reference, fake, setup_context, backward, samples, bad_samples)
