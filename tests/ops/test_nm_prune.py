"""The laws of ``fxprune::nm_prune``, each on every instruction set, element type and memory format that it speaks of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from fxprune.lowering import library
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxprune.ops.nm_prune import FUNCTIONS, OPERATOR
from tests.oracle import integers, poisoned

pytestmark = pytest.mark.skipif(not library.available(), reason="the compiled library is missing")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEY = torch.tensor([11, 5, 2])
SELECTS = ("random", "magnitude")  # what stays is unchanged


def prune(grad: Tensor, n: int, m: int, function: str = "magnitude", dim: int = 1, **rest: Any) -> Tensor:
    options = {"key": KEY, "groups": 1, "layer": 1, **rest}
    return torch.ops.fxprune.nm_prune(grad, options["key"], n, m, dim, options["groups"], function, options["layer"])


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def grouped(x: Tensor, m: int) -> Tensor:
    """(B, C, S) -> (B, C/m, m, S)."""
    return x.reshape(x.shape[0], -1, m, x[0, 0].numel())


@st.composite
def calls(draw: st.DrawFn) -> tuple[Any, ...]:
    m = draw(st.sampled_from((1, 2, 3, 4, 4, 5, 8, 8, 16, 31, 32)))
    n = draw(st.integers(1, m))
    groups = draw(st.sampled_from((1, 1, 1, 2, 3)))
    channels = groups * draw(st.integers(1, 2 * m + 3))
    dtype = draw(st.sampled_from(DTYPES))
    function = draw(st.sampled_from(FUNCTIONS))
    batch, seed = draw(st.integers(1, 3)), draw(st.integers(0, 999))
    where = draw(st.sampled_from(("first", "last", "last_in_memory", "strided")))
    positions = draw(st.sampled_from(((), (1,), (5,), (16,), (33,), (3, 7), (7, 7), (2, 3, 4))))
    values = integers if draw(st.booleans()) or function == "rescaled_magnitude" else normal
    if where == "last":
        grad, dim = values(batch, *positions, channels, seed=seed), -1
    else:
        grad, dim = values(batch, channels, *positions, seed=seed), 1
    grad = grad.to(dtype)
    if where == "last_in_memory" and positions:
        grad = grad.movedim(1, -1).contiguous().movedim(-1, 1)
    if where == "strided":
        grad = torch.stack([grad, grad + 1], -1)[..., 0]
    return grad, torch.tensor([seed, 2]), n, m, dim, groups, function, draw(st.integers(0, 9))


@given(args=calls(), isa_name=st.sampled_from(("scalar", "avx2", "avx512")))
def test_equals_the_reference_bit_for_bit(args: tuple[Any, ...], isa_name: str) -> None:
    before = torch.ops.fxprune.isa()
    try:
        torch.ops.fxprune.set_isa(isa_name)
    except RuntimeError:
        return
    try:
        with poisoned():
            result = torch.ops.fxprune.nm_prune(*args)
    finally:
        torch.ops.fxprune.set_isa(before)
    expected, fake = OPERATOR.reference(*args), OPERATOR.fake(*args)
    assert result.dtype == args[0].dtype and result.stride() == fake.stride() == expected.stride()
    assert torch.equal(result, expected), f"{args[1:]} on {isa_name}, grad {tuple(args[0].shape)}"


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (2, 8), (3, 7), (4, 32), (16, 32)])
def test_exactly_n_of_m_are_kept(function: str, n: int, m: int, isa: str) -> None:
    pruned = grouped(prune(normal(3, 3 * m, 5, 7), n, m, function), m)
    assert (pruned.count_nonzero(2) == n).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_n_largest_stay_and_ties_go_to_the_lower_index(
    dtype: torch.dtype, layout: torch.memory_format, isa: str
) -> None:
    grad = integers(2, 24, 9, 5).to(dtype).contiguous(memory_format=layout)  # nine values: every group has ties
    for n, m in ((1, 2), (2, 4), (3, 8), (5, 12), (7, 24)):
        x, pruned = grouped(grad, m), grouped(prune(grad, n, m), m)
        order = x.abs().sort(dim=2, descending=True, stable=True).indices
        keep = torch.zeros_like(x, dtype=torch.bool).scatter_(2, order[:, :, :n], True)
        assert torch.equal(pruned, torch.where(keep, x, 0))


@pytest.mark.parametrize("function", SELECTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_stays_is_unchanged(function: str, dtype: torch.dtype) -> None:
    grad = normal(2, 16, 11, dtype=dtype)
    pruned = prune(grad, 2, 4, function)
    kept = pruned != 0
    assert torch.equal(pruned[kept], grad[kept]) and kept.float().mean() == 0.5
    assert torch.equal(prune(grad, 4, 4, function), grad)


def test_random_keeps_every_subset_equally_often() -> None:
    pruned = grouped(prune(torch.ones(8, 4, 2500), 2, 4, "random"), 4)
    codes = ((pruned != 0) * torch.tensor([1, 2, 4, 8]).view(4, 1)).sum(2).flatten()
    counts = torch.bincount(codes, minlength=16)
    subsets = [c for c in range(16) if c.bit_count() == 2]
    assert counts.sum() == counts[subsets].sum() == 20000
    expected = 20000 / 6
    chi2 = ((counts[subsets] - expected) ** 2 / expected).sum()
    assert chi2 < 25.7  # five degrees of freedom, p = 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True])
def test_rescaling_restores_the_norm_of_each_sample_and_channel(dtype: torch.dtype, last: bool) -> None:
    grad = normal(3, 16, 6, 7, dtype=dtype)
    if last:
        grad = grad.contiguous(memory_format=torch.channels_last)
    magnitude, rescaled = prune(grad, 2, 4), prune(grad, 2, 4, "rescaled_magnitude")
    assert torch.equal(magnitude == 0, rescaled == 0)
    before, after = (t.double().abs().sum((2, 3)) for t in (grad, rescaled))
    alive = magnitude.abs().sum((2, 3)) > 0
    assert alive.float().mean() > 0.9
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(after[alive], before[alive], rtol=tolerance, atol=0)


def test_a_channel_that_dies_stays_zero() -> None:
    grad = normal(1, 4, 9)
    grad[:, 3] *= 1e-3
    pruned = prune(grad, 2, 4, "rescaled_magnitude")
    assert not pruned[:, 3].any() and torch.isfinite(pruned).all()


def test_group_rescaling_restores_the_norm_of_each_group() -> None:
    grad = normal(3, 16, 6, 7)
    pruned = prune(grad, 2, 8, "group_rescaled_magnitude")
    torch.testing.assert_close(grouped(pruned, 8).abs().sum(2), grouped(grad, 8).abs().sum(2), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (4, 8), (2, 8), (8, 32)])
def test_mvue_is_unbiased(n: int, m: int) -> None:
    """The mean of many draws is within four standard deviations of the gradient, element by element."""
    grad, draws = normal(1, m, 1, seed=m), 40000
    pruned = prune(grad.expand(1, m, draws), n, m, "mvue").double().squeeze(0)
    deviation = pruned.var(1).sqrt() / math.sqrt(draws)
    error = (pruned.mean(1) - grad.double().flatten()).abs()
    assert (error <= 4 * deviation + 1e-6).all(), error / deviation
    assert not (prune(grad.expand(1, m, draws), n, m, "magnitude").mean(2) - grad.flatten()).abs().max() < 0.05


@pytest.mark.parametrize(("n", "m", "expected"), [(1, 2, 0.636), (2, 4, 0.474), (4, 8, 0.393), (8, 32, 1.59), (4, 32, 4.18)])
def test_mvue_has_the_least_variance(n: int, m: int, expected: float) -> None:
    """Against sum |x_i|^2 (1/p_i - 1) of the optimal probabilities, worked out for normal data."""
    grad = normal(4, m, 20000)
    error = (prune(grad, n, m, "mvue") - grad).square().sum() / grad.square().sum()
    assert error == pytest.approx(expected, rel=0.02)


def test_mvue_keeps_what_fits() -> None:
    grad = torch.zeros(1, 8, 3)
    grad[0, 2], grad[0, 5] = 1e-3, -7.0
    assert torch.equal(prune(grad, 2, 8, "mvue"), grad)
    assert not prune(torch.zeros(2, 8, 3), 2, 8, "mvue").any()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(function: str, dtype: torch.dtype, bad: float, isa: str) -> None:
    grad = normal(2, 16, 9, dtype=dtype)
    grad[1, 6, 4] = bad
    pruned = prune(grad, 2, 4, function)
    wrong = ~torch.isfinite(pruned)
    assert wrong.any() and not wrong[0].any() and not wrong[:, :4].any()
    assert wrong[1, 6, 4] or wrong[1, 4:8].any()
    assert torch.equal(pruned[0], prune(grad, 2, 4, function)[0])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_scaling_the_loss_scales_the_result(function: str) -> None:
    grad = normal(2, 16, 9) * 1e-6
    base = prune(grad, 2, 4, function)
    for power in (-20, 16, 60):
        assert torch.equal(prune(grad * 2.0**power, 2, 4, function), base * 2.0**power), power


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_memory_format_does_not_matter(function: str, dtype: torch.dtype) -> None:
    grad = integers(3, 20, 6, 7, seed=3).to(dtype)
    last = grad.contiguous(memory_format=torch.channels_last)
    first, other = prune(grad, 2, 8, function, groups=2), prune(last, 2, 8, function, groups=2)
    assert other.is_contiguous(memory_format=torch.channels_last) and not other.is_contiguous()
    assert torch.equal(first, other)
    moved = prune(grad.movedim(1, -1), 2, 8, function, dim=-1, groups=2).movedim(-1, 1)
    assert torch.equal(moved, first)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_groups_start_anew(function: str) -> None:
    """Six channels in groups of four, in each of three convolution groups: 4 + 2, and of the two one stays."""
    grad = integers(2, 18, 5, seed=4, low=1)
    pruned = prune(grad, 2, 4, function, groups=3)
    kept = (pruned != 0).reshape(2, 3, 6, 5)
    assert (kept[:, :, :4].sum(2) == 2).all() and (kept[:, :, 4:].sum(2) == 1).all()
    if function == "magnitude":
        parts = [prune(part, 2, 4) for part in grad.chunk(3, 1)]
        assert torch.equal(pruned, torch.cat(parts, 1))


@pytest.mark.parametrize("function", ["random", "mvue"])
def test_random_numbers_follow_their_counters(function: str) -> None:
    grad = normal(2, 64, 9)
    base = prune(grad, 2, 4, function)
    assert torch.equal(base, prune(grad, 2, 4, function, key=KEY.clone()))
    for other in (KEY + torch.tensor([1, 0, 0]), KEY + torch.tensor([0, 1, 0]), KEY + torch.tensor([0, 0, 1])):
        assert 0.2 < ((prune(grad, 2, 4, function, key=other) != 0) != (base != 0)).float().mean() < 0.6
    assert not torch.equal(base, prune(grad, 2, 4, function, layer=2))
    assert not torch.equal((base != 0)[0], (base != 0)[1])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(base, prune(grad, 2, 4, function))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(0, 8, 3), (2, 8, 0), (2, 0, 3)])
def test_empty_gradients(shape: tuple[int, ...]) -> None:
    grad = torch.zeros(shape)
    assert prune(grad, 2, 4).shape == grad.shape and OPERATOR.reference(grad, KEY, 2, 4, 1, 1, "mvue", 0).shape == shape


def test_an_expanded_gradient_is_read_through_its_strides() -> None:
    grad = torch.ones(1).expand(2, 8, 5)
    pruned = prune(grad, 2, 4)
    assert pruned.is_contiguous() and torch.equal(pruned, prune(grad.clone(), 2, 4))


def test_half_precision_rounds_once() -> None:
    """A rescaled float16 gradient is the float32 result rounded to nearest, down to its subnormal numbers."""
    for dtype in (torch.float16, torch.bfloat16):
        grad = (normal(2, 16, 40) * torch.logspace(-9, 3, 40)).to(dtype)
        half = prune(grad, 2, 4, "group_rescaled_magnitude")
        assert torch.equal(half, prune(grad.float(), 2, 4, "group_rescaled_magnitude").to(dtype))
