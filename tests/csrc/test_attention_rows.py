"""Attention on row-major activations: every instruction set, sizes that fill no vector, layouts, masks."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxprune.ops import attention_rows
from tests.csrc.attentions import SIZES, chosen
from tests.csrc.kernels import OPS, every_isa, use_isa
from tests.csrc.test_memory import Fenced
from tests.integers import generator


@pytest.fixture(params=("scalar", "avx2", "avx512"))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from use_isa(request.param)


@pytest.mark.parametrize("size", (*SIZES, (101, 70)))
@pytest.mark.parametrize("depth", (8, 33, 64, 80))
def test_a_query_reads_one_key(isa: str, size: tuple[int, int], depth: int) -> None:
    """Where others are out by exp(-100) the result is one key's values, bit for bit."""
    for batch, heads in ((1, 1), (2, 3)):
        drawn = chosen(generator(*size, depth), batch, heads, depth, *size)
        q, k, v, y = (t.transpose(2, 3) for t in drawn)
        rows = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]  # heads side by side
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                results = [OPS.attention_rows(*rows, None, 8.0), OPS.attention_rows(q, k, v.contiguous(), None, 8.0)]
            finally:
                torch.set_num_threads(before)
            for result in results:
                assert result.is_contiguous() and torch.equal(result, y.transpose(1, 2))


LAYOUTS = ((0, 1, 2, 3), (0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 0, 1))


def drawn(gen: torch.Generator, sizes: tuple[int, ...], order: tuple[int, ...]) -> Tensor:
    """Random numbers, their dimensions stored in an order."""
    stored = torch.randn([sizes[d] for d in order], generator=gen)
    return stored.permute([order.index(d) for d in range(4)])


def near(ours: Tensor, args: tuple[Tensor, Tensor, Tensor, Tensor | None], scale: float) -> None:
    """No further from float64 than torch's own kernel, up to a few roundings of a result."""
    exact = attention_rows.reference(*(None if t is None else t.double() for t in args), scale)
    q, k, v, mask = args
    eager = F.scaled_dot_product_attention(q, k, v, mask, scale=scale).transpose(1, 2)
    errors = [(t.double() - exact).square().mean().sqrt().item() for t in (ours, eager)]
    assert errors[0] <= 1.5 * errors[1] + 1e-7, errors


@given(
    batch=st.integers(1, 3), heads=st.integers(1, 3), queries=st.integers(1, 70), keys=st.integers(1, 140),
    depth=st.integers(1, 90), layout=st.sampled_from(LAYOUTS), masked=st.sampled_from(("", "bhq", "b", "q", "h")),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_attention(
    batch: int, heads: int, queries: int, keys: int, depth: int, layout: tuple[int, ...], masked: str, seed: int
) -> None:
    """masked: the dimensions of a mask that are not 1."""
    gen = generator(seed, batch, heads, queries, keys, depth)
    q, k, v = (drawn(gen, (batch, heads, rows, depth), layout) for rows in (queries, keys, keys))
    mask = None
    if masked:
        sizes = [n if name in masked else 1 for n, name in ((batch, "b"), (heads, "h"), (queries, "q"))]
        mask = torch.where(
            torch.rand(*sizes, keys, generator=gen) < 0.3, -torch.inf, torch.randn(*sizes, keys, generator=gen)
        )
        mask[..., 0] = 0  # a key for every query
    for _ in every_isa():
        near(OPS.attention_rows(q, k, v, mask, 0.2), (q, k, v, mask), 0.2)


def test_a_query_without_keys_gives_zeros(isa: str) -> None:
    q, k, v, mask, scale = list(attention_rows.samples())[1]
    mask[0, 0, 3] = -torch.inf
    y = OPS.attention_rows(q, k, v, mask, scale)
    assert (y[0, 3] == 0).all() and (y[0, 4] != 0).any() and not y.isnan().any()


def test_a_masked_key_has_no_share(isa: str) -> None:
    """Also one of values so large that the smallest share of them would show."""
    q, k, v, _, scale = next(attention_rows.samples())
    mask = torch.zeros(1, 1, 1, 5)
    mask[..., 2] = -torch.inf
    whole, v[:, :, 2] = OPS.attention_rows(q, k, v, mask, scale), 3e38
    assert torch.equal(OPS.attention_rows(q, k, v, mask, scale), whole)


def test_nan_stays_with_its_query(isa: str) -> None:
    q, k, v, _, scale = next(attention_rows.samples())
    q[0, 0, 2, 0] = torch.nan
    broken = OPS.attention_rows(q, k, v, None, scale)
    assert broken[0, 2, 0].isnan().all() and broken.isnan().sum() == q.shape[3]


def test_large_scores_do_not_overflow(isa: str) -> None:
    q, k, v, _, _ = next(attention_rows.samples())
    args = (1e4 * q, 1e4 * k, v, None)
    near(OPS.attention_rows(*args, 1.0), args, 1.0)


def test_no_queries() -> None:
    q, k, v, _, scale = next(attention_rows.samples())
    assert OPS.attention_rows(q[:, :, :0], k, v, None, scale).shape == (1, 0, 2, 8)


@pytest.mark.skipif(sys.platform != "linux", reason="places tensors with Linux's mmap")
@pytest.mark.parametrize("at_end", (True, False))
def test_no_input_is_read_beyond_its_ends(isa: str, at_end: bool) -> None:
    fence = Fenced(at_end)
    try:
        for args in attention_rows.samples():
            placed = (fence(a.contiguous()) if isinstance(a, Tensor) else a for a in args)
            OPS.attention_rows(*placed)
    finally:
        fence.release()
