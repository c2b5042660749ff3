"""Attention on feature-major activations: every instruction set, sizes that fill no block, masks, alone and in a region."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.ops import attention, region
from fxprune.ops.bundle import bundle
from tests.csrc.attentions import SIZES, chosen
from tests.csrc.kernels import BF16_ISAS, OPS, use_isa
from tests.csrc.programs import as_text
from tests.csrc.test_memory import Fenced
from tests.integers import generator, integers, tiles


@pytest.fixture(params=BF16_ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from use_isa(request.param)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("depth", (8, 33, 64))
def test_a_query_reads_one_key(isa: str, size: tuple[int, int], depth: int) -> None:
    """Where others are out by exp(-100) the result is one key's values, bit for bit."""
    for batch, heads in ((1, 1), (2, 3)):
        drawn = chosen(generator(*size, depth), batch, heads, depth, *size)
        q, k, v, expected = (t.flatten(1, 2).bfloat16() for t in drawn)
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                y = OPS.attention(q, k, v, None, heads, 8.0)
            finally:
                torch.set_num_threads(before)
            assert y.is_contiguous() and y.dtype == torch.bfloat16 and torch.equal(y, expected)


def as_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(1, (heads, x.shape[1] // heads)).transpose(2, 3)


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("size", SIZES)
def test_as_exact_as_eager(isa: str, size: tuple[int, int], masked: bool) -> None:
    """No further from float64 than torch's own kernel, up to a few roundings of a result."""
    gen, heads, depth = generator(*size), 3, 40
    q, k, v = (torch.randn(2, heads * depth, n, generator=gen).bfloat16() for n in (size[0], size[1], size[1]))
    mask = torch.where(torch.rand(2, size[1], size[0], generator=gen) < 0.3, -torch.inf, 0.5).bfloat16() if masked else None
    if mask is not None:
        mask[:, 0] = 0  # a key for every query
    exact = attention.reference(q.double(), k.double(), v.double(), None if mask is None else mask.double(), heads, 0.2)
    added = None if mask is None else mask.transpose(1, 2).unsqueeze(1)
    eager = F.scaled_dot_product_attention(*(as_heads(t, heads) for t in (q, k, v)), added, scale=0.2)
    ours = OPS.attention(q, k, v, mask, heads, 0.2)
    errors = [(t.double() - exact).square().mean().sqrt().item() for t in (ours, eager.transpose(2, 3).flatten(1, 2))]
    assert errors[0] <= 1.1 * errors[1] + 1e-4, errors


def test_a_query_without_keys_gives_zeros(isa: str) -> None:
    q, k, v, mask, heads, scale = list(attention.samples())[1]
    mask[0, :, 3] = -torch.inf
    y = OPS.attention(q, k, v, mask, heads, scale)
    assert (y[0, :, 3] == 0).all() and (y[0, :, 4] != 0).any() and not y.isnan().any()


def test_nan_stays_with_its_query(isa: str) -> None:
    q, k, v, _, heads, scale = next(attention.samples())
    q[0, 0, 2] = torch.nan
    broken = OPS.attention(q, k, v, None, heads, scale)
    depth = q.shape[1] // heads
    assert broken[0, :depth, 2].isnan().all() and broken.isnan().sum() == depth


@pytest.mark.skipif(sys.platform != "linux", reason="places tensors with Linux's mmap")
@pytest.mark.parametrize("at_end", (True, False))
def test_no_input_is_read_beyond_its_ends(isa: str, at_end: bool) -> None:
    fence = Fenced(at_end)
    try:
        for args in attention.samples():
            OPS.attention(*(fence(a) if isinstance(a, Tensor) else a for a in args))
    finally:
        fence.release()


def layer(gen: torch.Generator, features: int, masked: bool) -> tuple[list[Tensor], list[int], int]:
    """Weights and steps of: three products of x, attention, a product with x added, a norm; and the result's number."""
    packed = [t for _ in range(4) for t in tiles(gen, features, features, 64)[1]]
    first = 2 if masked else 1
    code = []
    for number in range(3):
        at = 4 * number
        code += [region.GEMM, 12, 0, at, at + 1, at + 2, at + 3, -1, -1, -1, features, 64, 1, 0]
    code += [region.ATTENTION, 6, first, first + 1, first + 2, 1 if masked else -1, 3, region.bits_of(0.25)]
    code += [region.GEMM, 12, first + 3, 12, 13, 14, 15, -1, 0, -1, features, 64, 1, 0]
    code += [region.NORM, 4, first + 4, -1, -1, region.bits_of(1e-6)]
    return packed, code, first + 5


@pytest.mark.parametrize("masked", (False, True))
@pytest.mark.parametrize("tokens", (1, 33, 64))
def test_step_of_a_region(isa: str, tokens: int, masked: bool) -> None:
    """A layer of a transformer as one call has the bits of its operators."""
    gen, features = generator(tokens), 3 * 16
    packed, code, result = layer(gen, features, masked)
    weights, layout = bundle([t.bfloat16() if t.is_floating_point() else t for t in packed])
    part = region.parts_of(weights, layout)
    called = (OPS.depthwise_taps, OPS.tile_gemm, OPS.tile_conv, OPS.channel_norm, OPS.attention)
    for batch in (1, 2, 3):
        x = [integers(gen, batch, features, tokens).bfloat16() / 4]
        x += [torch.where(torch.rand(batch, tokens, tokens, generator=gen) < 0.3, -torch.inf, 0.0).bfloat16()] * masked
        expected = region.interpret(x, part, code, [result], *called)
        given = OPS.region(*as_text((x, weights, layout, code, [result])))
        assert torch.equal(given[0], expected[0]) and (given[0] != 0).any()


@pytest.mark.parametrize(
    ("record", "message"),
    (
        ([0, 0, 0, -1, 5, region.bits_of(1.0)], "heads must divide"),
        ([0, 0, 0, -1, 0, region.bits_of(1.0)], "heads must divide"),
        ([0, 0, 0, -1, 2, 0], "scale"),
        ([0, 0, 0, -1, 2, 0x7F800000], "scale"),
        ([0, 1, 0, -1, 2, region.bits_of(1.0)], "shape of its k"),
        ([0, 1, 1, 0, 2, region.bits_of(1.0)], "mask"),
        ([0, 0, 9, -1, 2, region.bits_of(1.0)], "value"),
        ([0, 0, 0, -1, 2], "takes 6 arguments"),
    ),
)
def test_corrupted_steps_are_refused(record: list[int], message: str) -> None:
    x = [torch.ones(1, 8, n).bfloat16() for n in (4, 5)]
    code = [region.ATTENTION, len(record), *record]
    with pytest.raises(RuntimeError, match=message):
        OPS.region(*as_text((x, *bundle([torch.ones(4).bfloat16()]), code, [2])))


def test_float_values_are_refused() -> None:
    code = [region.ATTENTION, 6, 0, 0, 0, -1, 2, region.bits_of(1.0)]
    with pytest.raises(RuntimeError, match="bfloat16"):
        OPS.region(*as_text(([torch.ones(1, 8, 4)], *bundle([torch.ones(4)]), code, [1])))
