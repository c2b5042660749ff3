"""Kernels on a GPU whose blocks have 99 KiB of shared memory (sm_86, sm_89, sm_120), not the 163 or 227 of others."""

from __future__ import annotations

import pytest
import torch

from tests.cuda import test_depthwise_gradients as depthwise_gradients
from tests.cuda import test_depthwise_taps as depthwise_taps
from tests.cuda import test_nm_gemm as nm_gemm
from tests.cuda import test_tile_conv as tile_conv
from tests.cuda import test_tile_gemm as tile_gemm
from tests.cuda import test_tile_gemm_halved as tile_gemm_halved
from tests.cuda import test_tile_gradients as tile_gradients
from tests.cuda.simulator import ELEMENTS, Fault, Plant, small_gpu

HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("kernel", (3, 5, 7))
def test_depthwise_planes_of_many_images(kernel: int, dtype: torch.dtype) -> None:
    """With stride 2 the tiles of 128 small planes would not fit."""
    with small_gpu():
        for stride in (1, 2):
            geometry = ((kernel, kernel), (stride, stride), (kernel // 2, kernel // 2))
            for batch, plane in ((130, (7, 7)), (66, (14, 14))):
                depthwise_taps.check((batch, 1, *plane), *geometry, dtype=dtype)
        depthwise_gradients.check((130, 1, 7, 7), (kernel, kernel), 1, kernel // 2, dtype=dtype)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_tiles(dtype: torch.dtype) -> None:
    with small_gpu():
        tile_gemm.check((1, 200, 136), 200, 128, dtype=dtype)  # TileGemmMma or TileGemmFfma
        tile_gemm.check((1, 128, 800), 128, 128, dtype=dtype)  # TileGemmResident
        tile_gemm.check((1, 60, 40), 9, 2, dtype=dtype)  # TileGemmNarrow
        tile_conv.check((1, 20, 9, 11), 130, 128, (3, 3), 1, 1, dtype=dtype)


def test_tiles_in_tf32() -> None:
    with small_gpu():
        for g in (64, 128):
            tile_gemm.check((1, 200, 136), 200, g, dtype=torch.float32, tf32=True)
        tile_conv.check((1, 20, 9, 11), 130, 128, (3, 3), 1, 1, dtype=torch.float32, tf32=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_two_in_four(dtype: torch.dtype) -> None:
    with small_gpu():
        for g in (64, 128):
            tile_gemm_halved.check((1, 300, 136), 200, g, dtype)
        nm_gemm.check(130, 300, 136, dtype)


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_gradients_of_tiles(dtype: torch.dtype) -> None:
    """The input's gradient has two stages instead of three there in 16 bits."""
    with small_gpu():
        tile_gradients.check(tile_gradients.gemm_case((1, 100, 136), 256, 128), dtype, seed=1)
        tile_gradients.check(tile_gradients.gemm_case((2, 70, 49), 130, 64, columns=0.8), dtype, seed=2)
        tile_gradients.check(tile_gradients.conv_case((1, 5, 9, 11), 70, 64, (3, 3), 1, 1), dtype)


@pytest.mark.parametrize("plant", (Plant.SHORT_WAIT, Plant.NO_BARRIER), ids=lambda p: p.name)
def test_mistakes_with_two_stages_are_caught(plant: Plant) -> None:
    case = tile_gradients.gemm_case((1, 100, 328), 256, 128, keep=0.9)
    for seed in (0, 1, 2):
        with small_gpu(), pytest.raises((Fault, AssertionError)):
            tile_gradients.check(case, torch.bfloat16, "x", seed=seed, plant=plant)


def test_more_is_refused() -> None:
    with small_gpu(), pytest.raises(Fault, match="would refuse this launch"):
        tile_gemm.check((1, 200, 136), 256, 256, hopper=True)
