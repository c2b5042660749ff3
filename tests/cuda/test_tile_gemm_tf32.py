"""The CUDA kernels of tile_gemm and tile_conv in TF32 on the simulator: bit for bit on integers, which TF32 holds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fxprune.ops import cuda_tf32_image
from tests.cuda import test_tile_conv, test_tile_gemm
from tests.cuda.simulator import SEEDS, Fault, Plant, tile_gemm
from tests.integers import generator, tiles

FLOAT = {"dtype": torch.float32, "tf32": True}


@pytest.mark.parametrize("g", (16, 64, 100, 128, 256))
def test_tile_widths(g: int) -> None:
    for number, (shape, n) in enumerate((((1, 40, 8), 16), ((1, 100, 136), 260), ((2, 70, 40), 130))):
        test_tile_gemm.check(shape, n, g, activation="relu", seed=SEEDS[number], **FLOAT)


@pytest.mark.parametrize("extras", ("", "r", "g", "brg"))
def test_epilogues_and_rows_that_are_not_aligned(extras: str) -> None:
    for m in (24, 7, 49):
        test_tile_gemm.check((2, 40, m), 72, 64, extras=extras, activation="relu6", **FLOAT)
    test_tile_gemm.check((1, 33, 64), 130, 128, extras=extras, shift=1, **FLOAT)


def test_tiles_and_features_without_weights() -> None:
    test_tile_gemm.check((1, 70, 16), 256, 128, empty_tile=True, **FLOAT)
    test_tile_gemm.check((1, 70, 16), 128, 128, keep=0.0, **FLOAT)
    test_tile_gemm.check((2, 20, 16), 150, 64, columns=0.3, extras="br", activation="relu", **FLOAT)


def test_windows() -> None:
    test_tile_conv.check((2, 5, 9, 11), 40, 16, (3, 3), 1, 1, residual=True, activation="relu6", **FLOAT)
    test_tile_conv.check((1, 6, 13, 9), 70, 64, (3, 3), 2, 1, seed=1, **FLOAT)
    test_tile_conv.check((1, 3, 10, 12), 130, 128, (5, 2), 1, 2, activation="relu", seed=2, **FLOAT)
    test_tile_conv.check((2, 8, 6, 10), 32, 16, (3, 3), 1, 1, groups=2, **FLOAT)


def nearest(values: Tensor) -> Tensor:
    """Round to 10 bits behind the point by arithmetic, ties away from zero."""
    fraction, exponent = torch.frexp(values.double())
    whole = (fraction.abs() * 2**11 + 0.5).floor() * fraction.sign()
    return torch.ldexp(whole, exponent - 11).float()


def test_rounding() -> None:
    """Of weights when they are packed, of tokens in the kernel: to the nearest, not towards zero."""
    gen = generator(1)
    edges = torch.tensor([1 + 2.0**-11, -(1 + 2.0**-11), 1 + 2.0**-11 - 2.0**-23, 1 + 3 * 2.0**-11, 0.0, 3.4e38])
    random = torch.randn(1000, generator=gen) * torch.logspace(-20, 20, 1000)
    for values in (edges, random):
        got = cuda_tf32_image.build(values).view(torch.float32)
        assert torch.equal(got, nearest(values)) and not torch.equal(got, values)
    special = torch.tensor([float("inf"), -float("inf"), float("nan")])
    assert torch.equal(cuda_tf32_image.rounded(special).isnan(), special.isnan())
    assert torch.equal(cuda_tf32_image.rounded(special[:2]), special[:2])

    _, (values, *structure) = tiles(gen, 64, 8, 64, 1.0, 1.0)
    values = nearest(torch.randn(values.shape, generator=gen))
    x = torch.randn(1, 8, 40, generator=gen)
    got = tile_gemm(x, values, *structure, None, None, None, 64, 64, tf32=True)
    exact = values.view(8, 64).t().double() @ nearest(x).double()
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=4e-6)
    assert (got.double() - values.view(8, 64).t().double() @ x.double()).abs().max() > 1e-4


@pytest.mark.parametrize("plant", (Plant.SHORT_WAIT, Plant.NO_BARRIER, Plant.ACCUMULATOR_ROW), ids=lambda p: p.name)
@pytest.mark.parametrize("g", (64, 128))
def test_mistakes_are_caught(g: int, plant: Plant) -> None:
    for seed in SEEDS:
        with pytest.raises((Fault, AssertionError)):
            test_tile_gemm.check((1, 100, 130), g, g, keep=0.9, seed=seed, plant=plant, **FLOAT)


@pytest.mark.fuzz
@given(data=st.data())
def test_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 90)), draw(st.integers(1, 140)))
    test_tile_gemm.check(
        shape, draw(st.integers(1, 150)), draw(st.sampled_from((9, 12, 64, 100, 128))),
        keep=draw(st.sampled_from((0.1, 0.6, 1.0))), columns=draw(st.sampled_from((0.5, 1.0))),
        extras=draw(st.sampled_from(("", "b", "br", "bg"))), seed=draw(st.sampled_from(SEEDS)),
        shift=draw(st.sampled_from((0, 0, 1))), **FLOAT,
    )  # fmt: skip
