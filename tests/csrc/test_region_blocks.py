"""Blocks of a network as regions, on planes large enough to be cut in bands, bit for bit on each instruction set."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.ops import activation, region
from fxprune.ops.bundle import bundle
from tests.csrc.kernels import OPS
from tests.csrc.programs import as_text
from tests.integers import bitmap, generator, integers, tiles

RELU6, NONE = activation.NAMES.index("relu6"), activation.NAMES.index("none")
Case = tuple[list[Tensor], list[Tensor], list[int], list[int], list[int]]


def block(
    batch: int, size: tuple[int, int], kernel: int, stride: int, dilation: int = 1, granularity: int = 8, stem: bool = False
) -> Case:
    """A strided stem, then expand -> depthwise -> project, twice; the second one with a residual.

    stem: the first expansion is a 3x3 convolution, not a 1x1 one; some of its features are pruned.
    """
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

    def conv(x: int, k: int, n: int, stride: int, act: int, columns: float = 1.0) -> None:
        weights = keep([*tiles(gen, n, k * 9, 8, 0.6, columns)[1], integers(gen, n)])
        step(region.CONV, [x, *weights, -1, n, 8, 3, 3, stride, stride, 1, 1, 1, 1, 1, act])

    conv(0, 3, 6, 2, RELU6)
    if stem:
        conv(1, 6, 20, 1, RELU6, columns=0.7)
    else:
        gemm(1, 6, 20, -1, RELU6)
    depthwise(2, 20, stride)
    gemm(3, 20, 7, -1, NONE)
    gemm(4, 7, 24, -1, RELU6)
    depthwise(5, 24, 1)
    gemm(6, 24, 7, 4, NONE)
    conv(7, 7, 9, 1, NONE)
    return [integers(gen, batch, 3, *size)], *bundle(packed), code, [7, 8]


def check(case: Case) -> None:
    expected = region.reference(*as_text(case))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for given, right in zip(OPS.region(*as_text(case)), expected, strict=True):
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


@pytest.mark.parametrize("kernel, stride", ((3, 1), (3, 2), (5, 2)))
def test_stems(isa: str, kernel: int, stride: int) -> None:
    """A larger convolution computes the rows that a band of the depthwise one reads, in pieces of its own."""
    check(block(1, (150, 151), kernel, stride, stem=True))
    check(block(3, (45, 98), kernel, stride, stem=True))
    check(block(1, (140, 133), 3, stride, dilation=2, stem=True))


def test_dilated_windows(isa: str) -> None:
    check(block(1, (140, 133), 3, 1, dilation=2))
    check(block(1, (140, 133), 3, 2, dilation=3))


@pytest.mark.parametrize("size", ((14, 14), (28, 30), (13, 57), (2, 200), (200, 2)))
def test_small_planes(isa: str, size: tuple[int, int]) -> None:
    """Planes that vectors run across, and those of less than a vector."""
    for stride in (1, 2):
        check(block(1, size, 3, stride))
        check(block(3, size, 5, stride))


@pytest.mark.parametrize("columns", (1.0, 0.7))
@pytest.mark.parametrize("size", ((56, 57), (28, 28), (14, 15), (7, 7)))
def test_two_products(isa: str, size: tuple[int, int], columns: float) -> None:
    """Wide values between two 1x1 convolutions, with and without a residual; the last two read one value: it is stored."""
    gen = generator(*size, int(10 * columns))
    packed: list[Tensor] = []
    code: list[int] = []

    def gemm(x: int, k: int, n: int, residual: int = -1) -> None:
        first = len(packed)
        packed.extend([*tiles(gen, n, k, 8, keep=0.4, columns=columns)[1], integers(gen, n)])
        code.extend([region.GEMM, 12, x, *range(first, first + 5), residual, -1, n, 8, 1, RELU6])

    gemm(0, 20, 300)
    gemm(1, 300, 20, 0)
    gemm(2, 20, 260)
    gemm(3, 260, 24)
    gemm(4, 24, 130)
    gemm(5, 130, 10)
    gemm(5, 130, 9)
    for batch in (1, 3):
        check(([integers(gen, batch, 20, *size)], *bundle(packed), code, [2, 4, 6, 7]))


@pytest.mark.parametrize("window", ((3, 3, 2, 2, 1, 1, 1, 1), (2, 5, 1, 3, 1, 2, 1, 1), (3, 3, 1, 2, 1, 1, 2, 3)))
@pytest.mark.parametrize("size", ((61, 45), (14, 15), (9, 200)))
def test_max_pooling(isa: str, size: tuple[int, int], window: tuple[int, ...]) -> None:
    gen = generator(*size, *window)
    packed = [*tiles(gen, 20, 6, 8, keep=0.6)[1], integers(gen, 20)]
    code = [region.GEMM, 12, 0, *range(5), -1, -1, 20, 8, 1, NONE, region.POOL, 9, 1, *window]
    for batch in (1, 3):
        check(([integers(gen, batch, 6, *size)], *bundle(packed), code, [2]))


def test_a_maximum_keeps_what_is_no_number(isa: str) -> None:
    x = integers(generator(1), 1, 4, 40, 40)
    x[0, 0, 5, 5], x[0, 1, 7, 20], x[0, 2] = float("nan"), float("inf"), float("-inf")
    code = [region.POOL, 9, 0, 3, 3, 2, 2, 1, 1, 1, 1]
    (given,) = OPS.region([x], [], "", region.text(code), [1])
    assert torch.equal(given.isnan(), F.max_pool2d(x, 3, 2, 1).isnan()) and given.isnan().any()
    assert torch.equal(given.nan_to_num(7.0), F.max_pool2d(x, 3, 2, 1).nan_to_num(7.0))


def test_results_do_not_depend_on_what_the_arena_held() -> None:
    """The gaps between features are never read: poisoned by another call's values, results are the same."""
    case = block(1, (61, 45), 3, 1)
    expected = region.reference(*as_text(case))
    x, *rest = block(1, (149, 149), 3, 1)
    OPS.region(*as_text(([torch.full_like(x[0], float("nan"))], *rest)))
    for given, right in zip(OPS.region(*as_text(case)), expected, strict=True):
        assert torch.equal(given, right)
