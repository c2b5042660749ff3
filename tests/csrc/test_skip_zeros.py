"""``skip_zeros_mm`` at the ends of its panels, blocks and units, in every memory format and on every instruction set.

Small integers make every order of summation exact.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.csrc.kernels import OPS, every_isa
from tests.integers import generator, integers

# rows or (samples, positions), N, K: one of each, less than a vector, past a part of 128 channels and a block of outputs
ROWS = ((1, 1, 1), (3, 5, 7), (17, 129, 33), (5, 300, 128), (33, 16, 261))
MAPS = ((1, 1, 3, 2), (2, 5, 6, 9), (3, 17, 130, 17), (1, 40, 20, 150), (5, 49, 33, 18))


def sparse(share: float, *shape: int) -> Tensor:
    """Integers of which about ``share`` are not zero."""
    gen = generator(*shape)
    x = torch.where(integers(gen, *shape) > 0, 3.0, -2.0)
    return torch.where(torch.rand(*shape, generator=gen) < share, x, 0)


def check(x: Tensor, weight: Tensor, dim: int, what: str) -> None:
    expected = (x.double().movedim(dim, -1) @ weight.double()).movedim(-1, dim).float()
    y = OPS.skip_zeros_mm(x, weight, dim)
    assert torch.equal(y, expected), what
    assert y.is_contiguous() == (x.is_contiguous() or not x.movedim(dim, -1).is_contiguous()), what


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_rows(share: float) -> None:
    for isa in every_isa():
        for rows, n, k in ROWS:
            x, weight = sparse(share, rows, n), integers(generator(n, k), n, k)
            check(x, weight, -1, f"{isa} {rows} {n} {k}")
            check(x, weight, 1, f"{isa} {rows} {n} {k} dim 1")
            check(sparse(share, n, rows).t(), weight, -1, f"{isa} {rows} {n} {k} strided")
            check(x, integers(generator(n, k), k, n).t(), -1, f"{isa} {rows} {n} {k} transposed weight")


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_maps_in_both_memory_formats(share: float) -> None:
    for isa in every_isa():
        for samples, positions, n, k in MAPS:
            x, weight = sparse(share, samples, n, positions), integers(generator(n, k), n, k)
            check(x, weight, 1, f"{isa} {samples} {positions} {n} {k}")
            last = x.unsqueeze(-1).movedim(1, -1).contiguous().movedim(-1, 1)
            check(last, weight, 1, f"{isa} {samples} {positions} {n} {k} channels last")


def test_units_of_several_threads() -> None:
    threads, weight = torch.get_num_threads(), integers(generator(1), 24, 40)
    try:
        for count, rows in itertools.product((1, 2, 3), (1, 2, 31, 512, 1100)):
            torch.set_num_threads(count)
            check(sparse(0.3, rows, 24), weight, -1, f"{count} threads, {rows} rows")
            check(sparse(0.3, 4, 24, rows), weight, 1, f"{count} threads, 4 x {rows} pixels")
    finally:
        torch.set_num_threads(threads)


def test_the_cut_does_not_change_a_bit() -> None:
    """Sums follow the order of the channels alone, so rows by themselves are rows among others."""
    x, weight = torch.randn(600, 200), torch.randn(200, 150)
    x = torch.where(torch.rand(600, 200) < 0.5, x, 0)
    for isa in every_isa():
        whole = OPS.skip_zeros_mm(x, weight, -1)
        assert torch.equal(torch.cat([OPS.skip_zeros_mm(part, weight, -1) for part in x.split(37)]), whole), isa
        assert torch.equal(OPS.skip_zeros_mm(x.t()[None], weight, 1)[0].t(), whole), isa


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_no_zero(bad: float) -> None:
    for isa in every_isa():
        x = torch.zeros(3, 20)
        x[1, 7], x[2, 3] = bad, -0.0
        y = OPS.skip_zeros_mm(x, torch.ones(20, 5), -1)
        assert not torch.isfinite(y[1]).any() and not y[[0, 2]].any(), isa


def test_a_zero_skips_what_is_not_finite() -> None:
    weight = torch.ones(20, 5)
    weight[4] = float("nan")
    assert torch.equal(OPS.skip_zeros_mm(torch.zeros(2, 20), weight, -1), torch.zeros(2, 5))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_empty_operands(shape: tuple[int, int]) -> None:
    y = OPS.skip_zeros_mm(torch.zeros(shape), torch.ones(shape[1], 6), -1)
    assert torch.equal(y, torch.zeros(shape[0], 6))
    assert OPS.skip_zeros_mm(torch.ones(2, 3), torch.ones(3, 0), -1).shape == (2, 0)
    assert OPS.skip_zeros_mm(torch.ones(2, 3, 0), torch.ones(3, 5), 1).shape == (2, 5, 0)
