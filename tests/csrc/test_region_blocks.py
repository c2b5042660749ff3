"""Blocks of a network as regions, on planes large enough to be cut in bands, bit for bit on each instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxprune.ops import activation, region
from fxprune.ops.bundle import bundle
from tests.csrc.kernels import OPS
from tests.integers import bitmap, generator, integers, tiles

RELU6, NONE = activation.NAMES.index("relu6"), activation.NAMES.index("none")
Case = tuple[list[Tensor], list[Tensor], list[int], list[int], list[int]]


def block(batch: int, size: tuple[int, int], kernel: int, stride: int, dilation: int = 1, granularity: int = 8) -> Case:
    """A strided stem, then expand -> depthwise -> project, twice; the second one with a residual."""
    gen = generator(batch, *size, kernel, stride, dilation, granularity)
    packed: list[Tensor] = []
    code: list[int] = []

    def keep(tensors: list[Tensor]) -> list[int]:
        packed.extend(tensors)
        return list(range(len(packed) - len(tensors), len(packed)))

    def step(number: int, record: list[int]) -> None:
        code.extend((number, len(record), *record))

    def gemm(x: int, k: int, n: int, residual: int, act: int) -> None:
        weights = keep([*tiles(gen, n, k, granularity, keep=0.4)[1], integers(gen, n)])
        step(region.GEMM, [x, *weights, residual, -1, n, granularity, 1, act])

    def depthwise(x: int, c: int, stride: int) -> None:
        mask = torch.rand(c, kernel * kernel, generator=gen) < 0.4
        weights = keep([integers(gen, *mask.shape) * mask, bitmap(mask), integers(gen, c)])
        half = kernel // 2 * dilation
        window = [kernel, kernel, stride, stride, half, half, dilation, dilation]
        step(region.DEPTHWISE, [x, *weights, *window, RELU6])

    stem = keep([*tiles(gen, 6, 27, 8, keep=0.6)[1], integers(gen, 6)])
    step(region.CONV, [0, *stem, -1, 6, 8, 3, 3, 2, 2, 1, 1, 1, 1, 1, RELU6])
    gemm(1, 6, 20, -1, RELU6)
    depthwise(2, 20, stride)
    gemm(3, 20, 7, -1, NONE)
    gemm(4, 7, 24, -1, RELU6)
    depthwise(5, 24, 1)
    gemm(6, 24, 7, 4, NONE)
    weights = keep([*tiles(gen, 9, 7 * 9, 8, keep=0.5)[1], integers(gen, 9)])
    step(region.CONV, [7, *weights, -1, 9, 8, 3, 3, 1, 1, 1, 1, 1, 1, 1, NONE])
    return [integers(gen, batch, 3, *size)], *bundle(packed), code, [7, 8]


def check(case: Case) -> None:
    expected = region.reference(*case)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for given, right in zip(OPS.region(*case), expected, strict=True):
                assert torch.equal(given, right), f"{threads} threads"
    finally:
        torch.set_num_threads(before)
    assert all((y != 0).float().mean() > 0.3 for y in expected)


@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("kernel", (3, 5))
def test_bands(isa: str, kernel: int, stride: int) -> None:
    """Several bands of rows, of odd sizes, the last one shorter; tiles of 8 and the odd 4."""
    check(block(1, (150, 151), kernel, stride))
    check(block(3, (161, 96), kernel, stride, granularity=4))


def test_dilated_windows(isa: str) -> None:
    check(block(1, (140, 133), 3, 1, dilation=2))
    check(block(1, (140, 133), 3, 2, dilation=3))


@pytest.mark.parametrize("size", ((14, 14), (28, 30), (13, 57), (2, 200), (200, 2)))
def test_small_planes(isa: str, size: tuple[int, int]) -> None:
    """Planes that vectors run across, and those of less than a vector."""
    for stride in (1, 2):
        check(block(1, size, 3, stride))
        check(block(3, size, 5, stride))


def test_results_do_not_depend_on_what_the_arena_held() -> None:
    """The gaps between features are never read: poisoned by another call's values, results are the same."""
    case = block(1, (61, 45), 3, 1)
    expected = region.reference(*case)
    x, *rest = block(1, (149, 149), 3, 1)
    OPS.region([torch.full_like(x[0], float("nan"))], *rest)
    for given, right in zip(OPS.region(*case), expected, strict=True):
        assert torch.equal(given, right)
