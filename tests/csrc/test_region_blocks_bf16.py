"""Blocks of a network as regions in bfloat16: the bits of the operators one by one, on each instruction set."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from fxprune.ops import region
from fxprune.ops.bundle import bundle, unbundle
from tests.csrc.kernels import BF16_ISAS, OPS, use_isa
from tests.csrc.programs import as_text
from tests.csrc.test_region_blocks import Case, Network, block, chain, sums
from tests.integers import generator, integers


@pytest.fixture(params=BF16_ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from use_isa(request.param)


def check(case: Case) -> None:
    def half(held: list[Tensor]) -> list[Tensor]:
        return [t.bfloat16() if t.is_floating_point() else t for t in held]

    x, weights, layout, code, outputs = case
    x, (weights, layout) = half(x), bundle(half(unbundle(weights, layout)))
    part = region.parts_of(weights, layout)
    expected = region.interpret(
        x, part, code, outputs, OPS.depthwise_taps, OPS.tile_gemm, OPS.tile_conv, OPS.channel_norm, OPS.attention
    )
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for given, right in zip(OPS.region(*as_text((x, weights, layout, code, outputs))), expected, strict=True):
                assert torch.equal(given, right), f"{threads} threads"
    finally:
        torch.set_num_threads(before)
    assert all((y != 0).float().mean() > 0.3 for y in expected)


@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("kernel", (3, 5))
def test_bands(isa: str, kernel: int, stride: int) -> None:
    check(block(1, (150, 151), kernel, stride))
    check(block(3, (161, 96), kernel, stride, granularity=32))
    check(block(1, (75, 49), kernel, stride, dilation=2))


@pytest.mark.parametrize("size", ((14, 14), (28, 30), (13, 57), (2, 200), (200, 2)))
def test_small_planes(isa: str, size: tuple[int, int]) -> None:
    for stride in (1, 2):
        check(block(1, size, 3, stride))
        check(block(3, size, 5, stride, granularity=32))


@pytest.mark.parametrize("columns", (1.0, 0.7))
@pytest.mark.parametrize("size", ((56, 57), (28, 28), (14, 15), (7, 7)))
def test_two_products(isa: str, size: tuple[int, int], columns: float) -> None:
    """Wide values between two 1x1 convolutions, with and without a residual."""
    net = Network(generator(*size, int(10 * columns)), granularity=32)
    for x, k, n, residual in ((0, 20, 300, -1), (1, 300, 20, 0), (2, 20, 260, -1), (3, 260, 24, -1)):
        net.gemm(x, k, n, residual, columns=columns)
    for batch in (1, 3):
        check(net.case(integers(net.gen, batch, 20, *size), [2, 4]))


@pytest.mark.parametrize("size", ((8, 8), (14, 15), (56, 57)))
def test_products_that_end_a_block_and_feed_the_next_depthwise_step(isa: str, size: tuple[int, int]) -> None:
    for batch in (1, 2, 3):
        check(chain(batch, size))


@pytest.mark.parametrize("size", ((7, 7), (40, 37), (131, 120)))
def test_sums_take_the_place_of_what_is_added(isa: str, size: tuple[int, int]) -> None:
    for batch in (1, 2, 9):
        check(sums(batch, size))
