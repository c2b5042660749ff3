"""rnn_steps: exact where gates saturate, close to fp64 elsewhere, and the same bits however its work is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxprune.ops import rnn_steps
from tests.csrc.kernels import OPS, every_isa
from tests.csrc.test_memory import Fenced
from tests.integers import generator, integers, tiles
from tests.oracle import assert_close_fp64, assert_exact

LARGE = 4096.0  # a sum of this or more, or none at all, makes a sigmoid 0, 1/2 or 1 and a tanh -1, 0 or 1


def arguments(
    steps: int, batch: int, hidden: int, g: int, lstm: bool, *, keep: float = 0.5, columns: float = 1.0, bias: bool = True,
    reverse: bool = False, seed: int = 0, exact: bool = False,
) -> tuple[object, ...]:  # fmt: skip
    gen = generator(seed, steps, batch, hidden, g)
    n = (4 if lstm else 3) * hidden
    _, (values, *structure) = tiles(gen, n, hidden, g, keep, columns)
    gates, shift = (integers(gen, *s) if exact else torch.randn(s, generator=gen) for s in ((steps, batch, n), (n,)))
    h, c = (integers(gen, batch, hidden) if exact else torch.randn(batch, hidden, generator=gen) for _ in range(2))
    if exact:
        values, gates, shift, c = values * LARGE, gates * LARGE, shift * LARGE, c * LARGE + LARGE / 2
        if lstm:  # a forget gate that is 1 keeps c large and the tanh of it 1 or -1
            gates[..., hidden : 2 * hidden] = 1e7
    else:
        values = values / hidden**0.5
    return gates, h, c if lstm else None, values, *structure, shift if bias else None, g, reverse


def check(args: tuple[object, ...], repro: str) -> None:
    doubled = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    assert_close_fp64(OPS.rnn_steps(*args), rnn_steps.reference(*args), rnn_steps.reference(*doubled), 1e-5, repro, 1.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("lstm", (True, False))
def test_saturated_cells_are_exact(isa: str, lstm: bool) -> None:
    for steps, batch, hidden, g in ((1, 1, 1, 64), (5, 2, 17, 4), (4, 13, 64, 64), (3, 1, 48, 16)):
        for reverse, columns in ((False, 1.0), (True, 0.7)):
            args = arguments(steps, batch, hidden, g, lstm, columns=columns, reverse=reverse, exact=True)
            repro = f"{steps} {batch} {hidden} {g} {lstm} {reverse}"
            assert_exact(OPS.rnn_steps(*args), rnn_steps.reference(*args), repro, hidden > 1, 0.8)  # type: ignore[arg-type]


@pytest.mark.parametrize("lstm", (True, False))
@pytest.mark.parametrize("threads", (1, 2))
def test_however_the_work_is_cut(isa: str, lstm: bool, threads: int) -> None:
    """One thread, rows a thread, aligned tiles a thread, tiles that straddle gates, and weights beyond a cache."""
    before = torch.get_num_threads()
    try:
        for batch, hidden, g, columns, keep in (
            (1, 64, 64, 1.0, 0.5), (13, 320, 64, 1.0, 0.6), (4, 320, 64, 1.0, 0.9), (4, 320, 64, 0.8, 0.9),
            (3, 330, 64, 1.0, 0.9), (13, 320, 64, 1.0, 1.0), (1, 512, 512, 1.0, 0.6), (1, 512, 4096, 1.0, 0.6),
        ):  # fmt: skip
            args = arguments(3, batch, hidden, g, lstm, keep=keep, columns=columns)
            torch.set_num_threads(1)
            one = OPS.rnn_steps(*args)
            torch.set_num_threads(threads)
            assert_exact(OPS.rnn_steps(*args), one, f"{batch} {hidden} {g} {columns}")
            if threads == 1:
                check(args, f"{batch} {hidden} {g} {columns}")
    finally:
        torch.set_num_threads(before)


@given(
    st.integers(0, 2**20), st.integers(1, 4), st.integers(1, 15), st.integers(1, 40), st.integers(1, 90), st.booleans(),
    st.sampled_from((0.0, 0.3, 1.0)), st.sampled_from((0.0, 0.5, 1.0)), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_shape(
    seed: int,
    steps: int,
    batch: int,
    hidden: int,
    g: int,
    lstm: bool,
    keep: float,
    columns: float,
    bias: bool,
    reverse: bool,
) -> None:
    args = arguments(steps, batch, hidden, g, lstm, keep=keep, columns=columns, bias=bias, reverse=reverse, seed=seed)
    for isa in every_isa():
        check(args, f"{args} on {isa}")


def test_tanh(isa: str) -> None:
    """With i = 1 and f = 0, c_n is the tanh of gate g."""
    x = torch.cat((torch.linspace(-12, 12, 100_001), torch.logspace(-30, 0, 1001), torch.tensor([0.0, float("inf")])))
    hidden = len(x)
    gates = torch.cat((torch.full_like(x, 500.0), torch.full_like(x, -500.0), x, x))[None, None]
    packed = (torch.zeros(0), *(torch.zeros(n, dtype=torch.int32) for n in (0, 1, 0)))
    c_n = OPS.rnn_steps(gates, torch.zeros(1, hidden), torch.ones(1, hidden), *packed, None, 64, False)[2][0]
    exact = x.double().tanh()
    assert ((c_n - exact).abs() <= 4e-7 * exact.abs() + 1e-37).all()
    assert c_n[-1] == 1.0 and c_n.abs().max() == 1.0


@pytest.mark.parametrize("lstm", (True, False))
def test_non_finite_states_are_kept(isa: str, lstm: bool) -> None:
    args = list(arguments(2, 3, 8, 4, lstm, keep=1.0))
    args[0][0, 1, 5] = float("nan")  # type: ignore[index]
    out = OPS.rnn_steps(*args)[0]
    assert out[:, 1].isnan().any() and not out[:, [0, 2]].isnan().any()


@pytest.mark.parametrize("at_end", (True, False))
def test_no_input_is_read_beyond_its_ends(isa: str, at_end: bool) -> None:
    fence = Fenced(at_end)
    try:
        for lstm in (True, False):
            for steps, batch, hidden, g in ((2, 3, 5, 4), (1, 1, 1, 1), (2, 2, 33, 64)):
                for reverse in (True, False):
                    args = arguments(steps, batch, hidden, g, lstm, reverse=reverse, columns=0.8)
                    check(tuple(fence(a) if isinstance(a, Tensor) else a for a in args), f"{steps} {batch} {hidden} {g}")
    finally:
        fence.release()


def test_any_strides() -> None:
    gates, h, c, *rest = arguments(3, 4, 6, 4, True)
    spread = [torch.stack((t, t), -1)[..., 0] for t in (gates, h, c)]  # type: ignore[list-item]
    assert_exact(OPS.rnn_steps(*spread, *rest), OPS.rnn_steps(gates, h, c, *rest))


@pytest.mark.parametrize("lstm", (True, False))
def test_no_steps_and_no_rows(isa: str, lstm: bool) -> None:
    gates, h, c, *rest = arguments(2, 3, 6, 4, lstm)
    out, *states = OPS.rnn_steps(gates[:0], h, c, *rest)  # type: ignore[index]
    assert out.shape == (0, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(states, (h, c)[: len(states)], strict=True))  # type: ignore[arg-type]
    no_rows = OPS.rnn_steps(gates[:, :0], h[:0], None if c is None else c[:0], *rest)  # type: ignore[index]
    assert [tuple(t.shape) for t in no_rows] == [(2, 0, 6), *[(0, 6)] * (2 if lstm else 1)]
