"""LayerNorm over channels: every ISA and type, sizes that fill no vector, alone and as a step of a region."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fxprune.ops import channel_norm, region
from fxprune.ops.bundle import bundle
from tests.csrc.kernels import OPS
from tests.csrc.programs import as_text
from tests.integers import generator, integers, tiles

SIZES = ((7, 7), (14, 14), (1, 1), (3, 5), (16, 4), (9, 23))


def operands(gen: torch.Generator, batch: int, channels: int, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch, channels, *size, generator=gen) * 3 + 5  # a mean far from zero
    weight, bias = torch.randn(2, channels, generator=gen)
    return x, weight, bias


@pytest.mark.parametrize("channels", (1, 2, 33, 96))
@pytest.mark.parametrize("size", SIZES)
def test_against_float64(isa: str, size: tuple[int, int], channels: int) -> None:
    for batch in (1, 3):
        x, weight, bias = operands(generator(*size, channels), batch, channels, size)
        for affine in ((weight, bias), (None, bias), (None, None)):
            wide = [None if t is None else t.double() for t in affine]
            exact = channel_norm.reference(x.double(), *wide, 1e-3)
            y = OPS.channel_norm(x, *affine, 1e-3)
            assert y.is_contiguous() and ((y - exact).abs().max() <= 2e-5 * exact.abs().max().clamp_min(1e-3))
            half = OPS.channel_norm(x.bfloat16(), *affine, 1e-3)
            near = channel_norm.reference(x.bfloat16().double(), *wide, 1e-3)
            assert half.dtype == torch.bfloat16
            assert ((half.double() - near).abs() <= 2**-8 * near.abs() + 1e-4 * near.abs().max()).all()


def test_pixels_do_not_depend_on_their_neighbours(isa: str) -> None:
    """A pixel is the same bit for bit wherever it lies in an image, and NaN stays in its own pixel."""
    x, weight, bias = operands(generator(1), 1, 33, (9, 23))
    y = OPS.channel_norm(x, weight, bias, 1e-6)
    for row, column in ((0, 0), (4, 11), (8, 22), (8, 21)):
        alone = OPS.channel_norm(x[:, :, row : row + 1, column : column + 1].contiguous(), weight, bias, 1e-6)
        assert torch.equal(alone.flatten(), y[0, :, row, column])
    x[0, 3, 4, 11] = float("nan")
    broken = OPS.channel_norm(x, weight, bias, 1e-6)
    assert broken[0, :, 4, 11].isnan().all() and broken.isnan().sum() == 33
    assert torch.equal(broken.nan_to_num(0)[0, :, :4], y[0, :, :4])


@pytest.mark.parametrize("size", ((14, 15), (7, 7), (28, 28)))
def test_step_between_products(isa: str, size: tuple[int, int]) -> None:
    """The values around it begin at cache lines, with gaps that it must skip."""
    gen = generator(*size)
    packed = [*tiles(gen, 20, 6, 8)[1], integers(gen, 20), *tiles(gen, 9, 20, 8)[1], torch.randn(20, generator=gen)]
    expand = [region.GEMM, 12, 0, 0, 1, 2, 3, 4, -1, -1, 20, 8, 1, 1]
    norm = [region.NORM, 4, 1, 9, -1, region.bits_of(1e-6)]
    project = [region.GEMM, 12, 2, 5, 6, 7, 8, -1, -1, -1, 9, 8, 1, 0]
    for batch in (1, 3):
        x = integers(gen, batch, 6, *size)
        case = ([x], *bundle(packed), [*expand, *norm, *project], [2, 3])
        for given, right in zip(OPS.region(*as_text(case)), region.reference(*as_text(case)), strict=True):
            torch.testing.assert_close(given, right, rtol=1e-5, atol=1e-4)


def test_step_behind_pooling(isa: str) -> None:
    """A channel vector is an image of one pixel."""
    weights = bundle([torch.randn(2, 20, generator=generator(2))[0]])
    code = [region.MEAN, 1, 0, region.NORM, 4, 1, 0, -1, region.bits_of(1e-6)]
    case = ([integers(generator(1), 3, 20, 4, 4)], *weights, code, [2])
    for given, right in zip(OPS.region(*as_text(case)), region.reference(*as_text(case)), strict=True):
        torch.testing.assert_close(given, right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("record", ([1, -1, -1, -1], [0, 99, -1, 0], [0, -1, -1, 0x7F800000], [0, -1, -1], [9, -1, -1, 0]))
def test_corrupted_steps_are_refused(record: list[int]) -> None:
    with pytest.raises(RuntimeError):
        OPS.region(*as_text(([torch.ones(1, 4, 3, 3)], *bundle([torch.ones(4)]), [region.NORM, len(record), *record], [1])))
