"""Blocks of a network as regions, on planes large enough to be cut in bands, bit for bit on each instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxprune.ops import activation, region
from fxprune.ops.bundle import bundle
from tests.csrc.kernels import OPS
from tests.csrc.programs import as_text
from tests.integers import bitmap, generator, integers, tiles

RELU6, NONE = activation.NAMES.index("relu6"), activation.NAMES.index("none")
Case = tuple[list[Tensor], list[Tensor], list[int], list[int], list[int]]


class Network:
    """Writes the steps of a program, with weights of their own. ``kernel`` and ``dilation`` are those of depthwise steps."""

    def __init__(self, gen: torch.Generator, kernel: int = 3, dilation: int = 1, granularity: int = 8) -> None:
        self.gen, self.kernel, self.dilation, self.granularity = gen, kernel, dilation, granularity
        self.packed: list[Tensor] = []
        self.code: list[int] = []

    def case(self, x: Tensor, outputs: list[int]) -> Case:
        return [x], *bundle(self.packed), self.code, outputs

    def gemm(self, x: int, k: int, n: int, residual: int = -1, act: int = RELU6, columns: float = 1.0) -> None:
        packed = tiles(self.gen, n, k, self.granularity, keep=0.4, columns=columns)[1]
        weights = self._keep([*packed, integers(self.gen, n)])
        self._step(region.GEMM, [x, *weights, residual, -1, n, self.granularity, 1, act])

    def depthwise(self, x: int, c: int, stride: int = 1) -> None:
        mask = torch.rand(c, self.kernel * self.kernel, generator=self.gen) < 0.4
        weights = self._keep([integers(self.gen, *mask.shape) * mask, bitmap(mask), integers(self.gen, c)])
        half = self.kernel // 2 * self.dilation
        window = [self.kernel, self.kernel, stride, stride, half, half, self.dilation, self.dilation]
        self._step(region.DEPTHWISE, [x, *weights, *window, RELU6])

    def conv(self, x: int, k: int, n: int, stride: int, act: int, columns: float = 1.0) -> None:
        weights = self._keep([*tiles(self.gen, n, k * 9, 8, 0.6, columns)[1], integers(self.gen, n)])
        self._step(region.CONV, [x, *weights, -1, n, 8, 3, 3, stride, stride, 1, 1, 1, 1, 1, act])

    def _keep(self, tensors: list[Tensor]) -> list[int]:
        self.packed.extend(tensors)
        return list(range(len(self.packed) - len(tensors), len(self.packed)))

    def _step(self, number: int, record: list[int]) -> None:
        self.code.extend((number, len(record), *record))


def block(
    batch: int, size: tuple[int, int], kernel: int, stride: int, dilation: int = 1, granularity: int = 8, stem: bool = False
) -> Case:
    """A strided stem, then expand -> depthwise -> project, twice; the second one with a residual.

    stem: the first expansion is a 3x3 convolution, not a 1x1 one; some of its features are pruned.
    """
    net = Network(generator(batch, *size, kernel, stride, dilation, granularity), kernel, dilation, granularity)
    net.conv(0, 3, 6, 2, RELU6)
    if stem:
        net.conv(1, 6, 20, 1, RELU6, columns=0.7)
    else:
        net.gemm(1, 6, 20)
    net.depthwise(2, 20, stride)
    net.gemm(3, 20, 7, act=NONE)
    net.gemm(4, 7, 24)
    net.depthwise(5, 24)
    net.gemm(6, 24, 7, residual=4, act=NONE)
    net.conv(7, 7, 9, 1, NONE)
    return net.case(integers(net.gen, batch, 3, *size), [7, 8])


def chain(batch: int, size: tuple[int, int]) -> Case:
    """1x1 and depthwise convolutions in turn (MobileNetV1), while an early value waits for the last one."""
    net = Network(generator(batch, *size))
    net.gemm(0, 6, 12)
    for number in (1, 3, 5):
        net.gemm(number, 12, 12)
        net.depthwise(number + 1, 12)
    net.gemm(7, 12, 12, residual=1, act=NONE)
    return net.case(integers(net.gen, batch, 6, *size), [8])


def sums(batch: int, size: tuple[int, int]) -> Case:
    """Values that are added where they may be overwritten, and where they may not: they are read later, or by what runs with
    the addition."""
    net = Network(generator(batch, *size))
    net.gemm(0, 6, 24)
    net.gemm(1, 24, 8)
    net.conv(2, 8, 8, 1, RELU6)
    net.gemm(3, 8, 24, residual=1)  # in place
    net.gemm(4, 24, 8)
    net.gemm(5, 8, 24, residual=4)  # two products in one
    net.gemm(6, 24, 24, residual=6)  # of itself
    net.gemm(7, 24, 8)
    net.conv(8, 8, 8, 1, RELU6)
    net.gemm(9, 8, 24, residual=7)  # in place
    net.gemm(10, 24, 24)
    net.depthwise(11, 24)
    net.gemm(12, 24, 24, residual=10)  # a block that reads it in bands
    net.gemm(13, 24, 24)
    net.gemm(14, 24, 24, residual=13)  # in place
    net.gemm(15, 24, 24, residual=14)  # of what the step before read
    net.gemm(16, 24, 24, residual=15)  # wanted below
    net.gemm(17, 24, 24, residual=15, act=NONE)
    return net.case(integers(net.gen, batch, 6, *size), [18])


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


def test_few_images_take_small_steps_in_turn(isa: str) -> None:
    """More images than take a late step in turn, so that groups of several sizes run; the first steps are large."""
    for batch in (9, 16):
        check(block(batch, (120, 131), 3, 2))


@pytest.mark.parametrize("size", ((7, 7), (40, 37), (131, 120)))
def test_sums_take_the_place_of_what_is_added(isa: str, size: tuple[int, int]) -> None:
    for batch in (1, 2, 9):
        check(sums(batch, size))


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
    net = Network(generator(*size, int(10 * columns)))
    for x, k, n, residual in (
        (0, 20, 300, -1), (1, 300, 20, 0), (2, 20, 260, -1), (3, 260, 24, -1), (4, 24, 130, -1),
        (5, 130, 10, -1), (5, 130, 9, -1),
    ):  # fmt: skip
        net.gemm(x, k, n, residual, columns=columns)
    for batch in (1, 3):
        check(net.case(integers(net.gen, batch, 20, *size), [2, 4, 6, 7]))


@pytest.mark.parametrize("size", ((8, 8), (14, 15), (56, 57)))
def test_products_that_end_a_block_and_feed_the_next_depthwise_step(isa: str, size: tuple[int, int]) -> None:
    for batch in (1, 2, 3):
        check(chain(batch, size))
