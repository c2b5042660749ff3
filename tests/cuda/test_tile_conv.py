"""The CUDA kernels of tile_conv on the simulator, bit for bit on integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.cuda.activations import EXACT
from tests.cuda.simulator import ELEMENTS, SEEDS, Fault, Plant, tile_conv
from tests.integers import generator, integers, tiles


def grouped(n: int, k: int, g: int, groups: int, keep: float, columns: float) -> tuple[Tensor, list[Tensor]]:
    """Return the dense weight (N, K) and its packed form, each tile inside one group."""
    parts = [tiles(generator(n, k, g, i), n // groups, k, g, keep, columns) for i in range(groups)]
    starts = [0, *torch.tensor([len(p[1][1]) for p in parts]).cumsum(0).tolist()]
    weight = torch.cat([p[0] for p in parts])
    values, index = (torch.cat([p[1][i] for p in parts]) for i in (0, 1))
    ptr = torch.cat([torch.zeros(1), *(p[1][2][1:] + start for p, start in zip(parts, starts, strict=False))]).int()
    kept = torch.cat([p[1][3] + i * (n // groups) for i, p in enumerate(parts)])
    return weight, [values, index, ptr, kept.int()]


def case(
    shape: tuple[int, int, int, int], n: int, g: int, kernel: tuple[int, int], stride: int = 1, padding: int = 0,
    dilation: int = 1, groups: int = 1, *, keep: float = 0.5, columns: float = 1.0, residual: bool = False,
    activation: str = "none",
) -> tuple[list[Any], Tensor]:  # fmt: skip
    """Return the operator's arguments and the result in fp64."""
    k = shape[1] // groups * kernel[0] * kernel[1]
    weight, packed = grouped(n, k, g, groups, keep, columns)
    gen = generator(*shape, n, g, *kernel)
    x, bias = integers(gen, *shape), integers(gen, n)
    window = weight.view(n, shape[1] // groups, *kernel)
    y = F.conv2d(x.double(), window.double(), bias.double(), stride, padding, dilation, groups)
    extra = integers(gen, *y.shape) if residual else None
    y = EXACT[activation](y if extra is None else y + extra)
    windows = ([*kernel], [stride] * 2, [padding] * 2, [dilation] * 2)
    return [x, *packed, bias, extra, n, g, *windows, groups, activation], y


def check(
    *args: Any, dtype: torch.dtype = torch.bfloat16, seed: int = 0, plant: Plant = Plant.NONE, hopper: bool = False,
    processors: int = 3, tf32: bool = False, **more: Any,
) -> None:  # fmt: skip
    """Run a :func:`case` and compare."""
    arguments, y = case(*args, **more)
    typed = [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    got = tile_conv(*typed, seed=seed, plant=plant, hopper=hopper, processors=processors, tf32=tf32)
    assert torch.equal(got, y.float().to(dtype)), f"{args} {more} {dtype} seed {seed}"


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_windows(dtype: torch.dtype) -> None:
    check((2, 5, 9, 11), 40, 8, (3, 3), 1, 1, dtype=dtype, residual=True, activation="relu6")
    check((1, 6, 13, 9), 70, 64, (3, 3), 2, 1, dtype=dtype, seed=1)
    check((1, 3, 10, 12), 130, 128, (5, 2), 1, 2, dtype=dtype, activation="relu", seed=2)
    check((1, 4, 12, 12), 20, 64, (3, 3), 1, 2, 2, dtype=dtype)
    check((1, 2, 20, 7), 16, 16, (7, 7), 3, 3, dtype=dtype)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_groups(dtype: torch.dtype) -> None:
    check((2, 8, 6, 10), 16, 4, (3, 3), 1, 1, groups=2, dtype=dtype, residual=True)
    check((1, 9, 7, 5), 9, 3, (3, 2), 1, 1, groups=3, dtype=dtype)


def test_channels_without_a_tile() -> None:
    for dtype in ELEMENTS:
        check((1, 4, 6, 6), 30, 8, (3, 3), 1, 1, dtype=dtype, columns=0.5, activation="relu")
        check((1, 4, 6, 6), 8, 8, (3, 3), 1, 1, dtype=dtype, columns=0.0)


def test_deep_reductions_and_many_pixels() -> None:
    check((1, 40, 15, 17), 64, 64, (3, 3), 1, 1, keep=0.9)
    check((1, 40, 5, 30), 64, 64, (3, 3), 1, 1, dtype=torch.float32, keep=0.3)


@pytest.mark.parametrize("seed", SEEDS)
def test_wgmma(seed: int) -> None:
    """Tiles of 128 and 256 channels, edges of the image, items that follow each other in a block, groups."""
    options = {"hopper": True, "seed": seed}
    check((2, 5, 9, 11), 256, 256, (3, 3), 1, 1, residual=True, activation="relu6", **options)
    check((1, 40, 9, 15), 200, 128, (3, 3), 1, 1, processors=1, keep=0.9, **options)
    check((1, 6, 13, 9), 256, 128, (3, 3), 2, 1, dtype=torch.float16, **options)
    check((2, 8, 6, 10), 256, 128, (3, 2), 1, 1, 2, groups=2, **options)


WGMMA = (
    Plant.NO_BARRIER, Plant.SWIZZLE, Plant.NO_PROXY_FENCE, Plant.NO_PHASE_WAIT, Plant.EARLY_ARRIVE, Plant.NO_MATRIX_FENCE,
)  # fmt: skip


@pytest.mark.parametrize("plant", WGMMA, ids=lambda p: p.name)
def test_mistakes_with_wgmma_are_caught(plant: Plant) -> None:
    for seed in SEEDS:
        with pytest.raises((Fault, AssertionError)):
            check((1, 40, 5, 30), 128, 128, (3, 3), 1, 1, keep=0.9, seed=seed, plant=plant, hopper=True, processors=1)


@pytest.mark.parametrize("plant", (Plant.SHORT_WAIT, Plant.NO_BARRIER, Plant.LANE_MAP, Plant.SWIZZLE), ids=lambda p: p.name)
def test_mistakes_are_caught(plant: Plant) -> None:
    """Every order of threads finds the mistake, as a fault or as a wrong result."""
    for seed in SEEDS:
        with pytest.raises((Fault, AssertionError)):
            check((1, 40, 5, 8), 64, 64, (3, 3), 1, 1, keep=0.9, seed=seed, plant=plant)


@pytest.mark.fuzz
@given(data=st.data())
def test_any_geometry(data: st.DataObject) -> None:
    draw = data.draw
    kernel = (draw(st.integers(1, 5)), draw(st.integers(1, 5)))
    groups, dilation = draw(st.sampled_from((1, 1, 2))), draw(st.integers(1, 2))
    least = max(kernel) * dilation
    shape = (draw(st.integers(1, 2)), groups * draw(st.integers(1, 9)), *(least + draw(st.integers(0, 9)) for _ in "hw"))
    g = draw(st.sampled_from((1, 8, 64, 128)))
    n = draw(st.integers(1, 40)) if groups == 1 else groups * g  # a tile lies inside one group
    check(
        shape, n, g, kernel, draw(st.integers(1, 3)),
        draw(st.integers(0, 3)), dilation, groups, dtype=draw(st.sampled_from(ELEMENTS)),
        keep=draw(st.sampled_from((0.2, 0.7))), residual=draw(st.booleans()), hopper=draw(st.booleans()),
        seed=draw(st.sampled_from(SEEDS)),
    )  # fmt: skip
