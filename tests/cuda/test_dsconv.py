"""The fused depthwise and 1x1 convolution on the simulator, bit for bit on integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.cuda.activations import EXACT
from tests.cuda.simulator import SEEDS, Fault, Plant, dsconv, shifted
from tests.integers import bitmap, generator, tiles

HALVES = (torch.float16, torch.bfloat16)


def case(
    shape: tuple[int, int, int, int], n: int, g: int, kernel: int = 3, stride: int = 1, *, keep: float = 0.5,
    columns: float = 1.0, residual: bool = False, inner: str = "none", outer: str = "none", empty_tile: bool = False,
) -> tuple[list[Any], Tensor]:  # fmt: skip
    """Return the operator's arguments and the result in fp64; what lies between the convolutions is exact in 16 bits."""
    gen = generator(*shape, n, g, kernel, stride)
    channels, count = shape[1], kernel * kernel
    mask = torch.rand(channels, count, generator=gen) < 0.4
    x = torch.randint(-1, 2, shape, generator=gen).float()
    weight = torch.randint(-2, 3, (channels, count), generator=gen).float()
    first_bias, bias = (torch.randint(-3, 4, (c,), generator=gen).float() for c in (channels, n))
    dense, packed = tiles(gen, n, channels, g, keep, columns, empty_tile)
    window = (weight * mask).view(channels, 1, kernel, kernel)
    between = EXACT[inner](F.conv2d(x, window, first_bias, stride, kernel // 2, 1, channels))
    y = torch.einsum("nc,bchw->bnhw", dense.double(), between.double()) + bias.view(-1, 1, 1)
    extra = torch.randint(-4, 5, y.shape, generator=gen).float() if residual else None
    y = EXACT[outer](y if extra is None else y + extra)
    windows = ([kernel] * 2, [stride] * 2, [kernel // 2] * 2, [1, 1])
    return [x, weight, bitmap(mask), first_bias, *packed, bias, extra, *windows, n, g, inner, outer], y


def check(
    *args: Any, dtype: torch.dtype = torch.bfloat16, seed: int = 0, shift: int = 0, plant: Plant = Plant.NONE, **more: Any
) -> None:
    """Run a :func:`case` and compare."""
    arguments, y = case(*args, **more)
    x, *rest = (a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)
    operands, ((kernel, _), (stride, _), _, _), last = rest[:9], rest[9:13], rest[13:]
    got = dsconv(shifted(x, shift), *operands, kernel, stride, *last, seed=seed, plant=plant)
    assert torch.equal(got, y.float().to(dtype)), f"{args} {more} {dtype} seed {seed}"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("kernel", (3, 5, 7))
def test_windows(kernel: int, stride: int, dtype: torch.dtype) -> None:
    check((1, 20, 9, 16), 24, 8, kernel, stride, dtype=dtype, inner="relu6", outer="relu")
    check((2, 5, 7, 7), 70, 64, kernel, stride, dtype=dtype, residual=True, seed=2)


def test_more_channels_than_a_chunk() -> None:
    check((1, 150, 8, 8), 40, 64, keep=0.8, inner="relu", seed=1)
    check((1, 64, 10, 24), 200, 128, keep=0.3, residual=True, outer="relu6")


def test_rows_that_are_not_aligned() -> None:
    for width in (1, 5, 14, 17):
        check((1, 9, 6, width), 20, 64, residual=True)
    check((1, 9, 8, 16), 20, 64, shift=1)


def test_features_without_a_tile_and_tiles_without_rows() -> None:
    for columns in (0.0, 0.4):
        check((1, 12, 8, 8), 100, 64, columns=columns, residual=True, outer="relu")
    check((1, 12, 8, 8), 128, 64, empty_tile=True)
    check((1, 12, 8, 8), 64, 64, keep=0.0)


@pytest.mark.parametrize("plant", (Plant.SHORT_WAIT, Plant.NO_BARRIER, Plant.LANE_MAP, Plant.SWIZZLE), ids=lambda p: p.name)
def test_mistakes_are_caught(plant: Plant) -> None:
    """Every order of threads finds the mistake, as a fault or as a wrong result."""
    for seed in SEEDS:
        with pytest.raises((Fault, AssertionError)):
            check((1, 140, 8, 8), 64, 64, keep=0.95, seed=seed, plant=plant)


@pytest.mark.fuzz
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 90)), draw(st.integers(1, 17)), draw(st.integers(1, 17)))
    check(
        shape, draw(st.integers(1, 90)), draw(st.sampled_from((1, 24, 64, 128))), draw(st.sampled_from((3, 5, 7))),
        draw(st.sampled_from((1, 2))), dtype=draw(st.sampled_from(HALVES)), keep=draw(st.sampled_from((0.2, 0.9))),
        columns=draw(st.sampled_from((0.5, 1.0))), residual=draw(st.booleans()), seed=draw(st.sampled_from(SEEDS)),
    )  # fmt: skip
