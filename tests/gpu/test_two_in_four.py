"""Weights kept two in four on the sparse tensor cores, and libraries' products of such gradients."""

from __future__ import annotations

import pytest
import torch
from fxprune.lowering.kernels import libraries
from torch import Tensor

from fxprune.ops import cuda_nm_image
from tests.cuda.test_nm_gemm import pruned
from tests.cuda.test_tile_gemm_halved import HALVES, case
from tests.gpu import place
from tests.gpu.place import on_gpu
from tests.integers import generator, integers

CALL = torch.ops.fxprune
# (batch, K, tokens), N, G, kept rows
SHAPES = (
    ((1, 40, 8), 8, 8, 0.6), ((2, 70, 49), 130, 64, 0.6), ((1, 200, 136), 200, 128, 1.0), ((1, 768, 4096), 768, 128, 0.4),
)  # fmt: skip


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("shape", "n", "g", "keep"), SHAPES, ids=str)
def test_tile_gemm(shape: tuple[int, int, int], n: int, g: int, keep: float, dtype: torch.dtype) -> None:
    """As for nm_mm: a wrong order of metadata shows here and nowhere else."""
    x, values, (index, tile_ptr, columns), y = case(shape, n, g, keep)
    image = cuda_nm_image.build(values.to(dtype), tile_ptr, g, len(columns))
    assert image is not None
    expected = y.float().to(dtype)
    for feature_dim in (1, -1):
        given = x if feature_dim == 1 else x.transpose(1, 2).contiguous()
        weights = [on_gpu(t) for t in (image, index, tile_ptr, columns)]
        if place.DEVICE == "cpu":  # the image is a GPU's alone
            weights[0] = values.to(dtype)
        got = CALL.tile_gemm(on_gpu(given, dtype), *weights, None, None, None, n, g, feature_dim, "none")
        assert torch.equal((got if feature_dim == 1 else got.transpose(1, 2)).cpu(), expected)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", libraries.PRODUCTS)
def test_libraries(name: str, dtype: torch.dtype) -> None:
    """One that says it is right is right at a layer's size too; one that is not here says why."""
    reason = libraries.missing(name, torch.device(place.DEVICE, 0) if place.DEVICE == "cuda" else torch.device("cpu"), dtype)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    gen = generator(3)
    x, weight = integers(gen, 1024, 768), integers(gen, 768, 1536)
    exact: Tensor = (pruned(x).double() @ weight.double()).float().to(dtype)
    got = libraries.multiply(on_gpu(x, dtype), on_gpu(weight, dtype), libraries.PRODUCTS[name])
    assert torch.equal(got.cpu(), exact)
