"""The CUDA kernels of nm_prune on the simulator, bit for bit against the operator's reference on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxprune.ops.nm_prune import FUNCTIONS, OPERATOR
from tests.cuda.simulator import ELEMENTS, SEEDS, Fault, Plant, nm_prune, shifted
from tests.integers import generator, integers

KEY = torch.tensor([11, 5, 2])
RATIOS = ((2, 4), (1, 2), (3, 8), (5, 16), (4, 32), (3, 7), (30, 31), (1, 1))


def values(function: str, *shape: int, seed: int = 0) -> Tensor:
    """Sums over a channel depend on their order, so they are of integers."""
    gen = generator(seed, *shape)
    return integers(gen, *shape) if function == "rescaled_magnitude" else torch.randn(*shape, generator=gen)


def check(
    shape: tuple[int, int, int], n: int, m: int, function: str, dtype: torch.dtype, *, groups: int = 1, seed: int = 0,
    shift: int = 0, grad: Tensor | None = None,
) -> None:  # fmt: skip
    """Compare both memory formats with the reference; shape: (B, C, S)."""
    grad = values(function, *shape, seed=seed).to(dtype) if grad is None else grad
    expected = OPERATOR.reference(grad, KEY, n, m, 1, groups, function, 3)
    for row_major in (False, True):
        given_grad = grad.transpose(1, 2).contiguous() if row_major else grad
        options = {"row_major": row_major, "seed": SEEDS[seed % 3]}
        got = nm_prune(shifted(given_grad, shift), KEY, n, m, groups, function, 3, **options)
        got = got.transpose(1, 2) if row_major else got
        assert torch.equal(got, expected), f"{shape} {n}:{m} {function} {dtype} groups {groups} row-major {row_major}"


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_ratios(function: str, dtype: torch.dtype) -> None:
    for number, (n, m) in enumerate(RATIOS):
        check((2, 2 * m, 37), n, m, function, dtype, seed=number)  # groups are whole: vectors where rows are aligned
        check((1, m + (m + 1) // 2, 5), n, m, function, dtype, seed=number)  # the last group is short


@pytest.mark.parametrize("function", FUNCTIONS)
def test_unaligned_rows(function: str) -> None:
    for dtype in ELEMENTS:
        check((1, 16, 9), 2, 4, function, dtype, shift=1)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_groups_of_a_convolution_start_anew(function: str) -> None:
    check((2, 18, 7), 2, 4, function, torch.float32, groups=3)
    check((1, 30, 40), 4, 8, function, torch.bfloat16, groups=2)


@pytest.mark.parametrize("function", ("random", "magnitude"))
def test_many_blocks(function: str) -> None:
    check((3, 8, 300), 2, 4, function, torch.float32, seed=2)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_ties_go_to_the_lower_index(dtype: torch.dtype) -> None:
    for n, m in ((2, 4), (3, 8), (7, 16), (9, 32)):
        grad = torch.ones(1, m, 3, dtype=dtype)
        got = nm_prune(grad, KEY, n, m, 1, "magnitude", 0, row_major=False)
        assert torch.equal(got[:, :n], grad[:, :n]) and not got[:, n:].any()


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_special_values_come_first_and_stay(function: str, dtype: torch.dtype) -> None:
    for m in (4, 16):
        grad = values(function, 1, m, 5).to(dtype)
        grad[0, m - 1, 1], grad[0, 2, 3] = float("nan"), float("-inf")
        expected = OPERATOR.reference(grad, KEY, 2, m, 1, 1, function, 0)
        for row_major in (False, True):
            laid = grad.transpose(1, 2).contiguous() if row_major else grad
            got = nm_prune(laid, KEY, 2, m, 1, function, 0, row_major=row_major)
            got = got.transpose(1, 2) if row_major else got
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("plant", (Plant.NO_BARRIER,), ids=lambda p: p.name)
@pytest.mark.parametrize("function", ("random", "rescaled_magnitude"))
def test_mistakes_are_caught(function: str, plant: Plant) -> None:
    for seed in SEEDS:
        with pytest.raises(Fault):
            nm_prune(values(function, 1, 8, 200), KEY, 2, 4, 1, function, 0, row_major=False, seed=seed, plant=plant)


@pytest.mark.fuzz
@given(data=st.data())
def test_any_call(data: st.DataObject) -> None:
    draw = data.draw
    m = draw(st.integers(1, 32))
    groups = draw(st.integers(1, 3))
    shape = (draw(st.integers(1, 3)), groups * draw(st.integers(1, 2 * m + 2)), draw(st.integers(1, 40)))
    check(
        shape, draw(st.integers(1, m)), m, draw(st.sampled_from(FUNCTIONS)), draw(st.sampled_from(ELEMENTS)),
        groups=groups, seed=draw(st.integers(0, 99)),
    )  # fmt: skip
