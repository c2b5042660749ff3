"""``fxprune::add_squares``: exact on integers, within fp32's rounding elsewhere, and it refuses what does not fit."""

from __future__ import annotations

import pytest
import torch
from fxprune.lowering import library
from torch import Tensor

from fxprune.ops.add_squares import reference

pytestmark = pytest.mark.skipif(not library.available(), reason="the compiled library is missing")
SHAPES = [(0, 4), (1,), (3, 5), (17, 31), (64, 16, 3, 3), (130, 257)]


def triples(integers: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    gen = torch.Generator().manual_seed(0)

    def values(shape: tuple[int, ...]) -> Tensor:
        if integers:
            return torch.randint(-30, 31, shape, generator=gen).float()
        return torch.randn(shape, generator=gen)

    return [(values(s).abs(), values(s), values(s)) for s in SHAPES]


@pytest.mark.parametrize("integers", [True, False])
def test_it_adds_the_squares_of_products(integers: bool, isa: str) -> None:
    parts = triples(integers)
    exact = [s.double() + (a.double() * b.double()).square() for s, a, b in parts]
    slow = [s.clone() for s, _, _ in parts]
    sums, a, b = map(list, zip(*parts, strict=True))
    torch.ops.fxprune.add_squares(sums, a, b)
    reference(slow, a, b)
    for found, expected, right in zip(sums, slow, exact, strict=True):
        if integers:
            assert torch.equal(found.double(), right)
        torch.testing.assert_close(found.double(), right, rtol=5e-7, atol=1e-12)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


def test_nan_and_infinity_stay() -> None:
    sums = torch.zeros(40)
    left, right = torch.ones(40), torch.ones(40)
    left[3], left[39], right[20] = torch.nan, torch.inf, -torch.inf
    torch.ops.fxprune.add_squares([sums], [left], [right])
    assert sums[3].isnan() and sums[39] == torch.inf and sums[20] == torch.inf and sums.sum().isnan()
    assert int((sums == 1).sum()) == 37


@pytest.mark.parametrize(
    ("sums", "a", "b", "message"),
    [
        ([torch.zeros(4)], [], [torch.zeros(4)], "as many, got 1, 0 and 1"),
        ([torch.zeros(4)], [torch.zeros(4, dtype=torch.bfloat16)], [torch.zeros(4)], "contiguous float32"),
        ([torch.zeros(4, 2)], [torch.zeros(2, 4).t()], [torch.zeros(4, 2)], "contiguous float32"),
        ([torch.zeros(4)], [torch.zeros(5)], [torch.zeros(4)], r"shape of sums, \(4\), got \(5\)"),
    ],
)
def test_it_refuses(sums: list[Tensor], a: list[Tensor], b: list[Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fxprune.add_squares(sums, a, b)
