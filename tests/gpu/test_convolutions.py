"""Convolutions of the CUDA library on a GPU, bit for bit on integers: tile_conv, dsconv, depthwise_pool."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.ops import cuda_tile_image as tile_image
from tests.cuda import test_dsconv as pairs
from tests.cuda import test_tile_conv as convolutions
from tests.gpu.place import DTYPES, on_gpu
from tests.integers import bitmap, generator, integers

CALL = torch.ops.fxprune
# (x, n, g, kernel, stride, padding, dilation, groups)
CONVOLUTIONS: tuple[tuple[Any, ...], ...] = (
    ((2, 5, 9, 11), 40, 8, (3, 3), 1, 1), ((1, 6, 13, 9), 70, 64, (3, 3), 2, 1), ((1, 3, 10, 12), 130, 128, (5, 2), 1, 2),
    ((1, 4, 12, 12), 20, 64, (3, 3), 1, 2, 2), ((2, 8, 6, 10), 16, 4, (3, 3), 1, 1, 1, 2),
    ((4, 64, 28, 28), 128, 128, (3, 3), 1, 1), ((2, 3, 224, 224), 64, 64, (7, 7), 2, 3),
    ((1, 40, 9, 15), 256, 256, (3, 3), 1, 1),
)  # fmt: skip
# (x, n, g): small ones, and pairs of real models
PAIRS: tuple[tuple[Any, ...], ...] = (
    ((2, 20, 9, 16), 24, 8), ((3, 5, 7, 7), 70, 64), ((1, 150, 8, 5), 200, 128), ((8, 144, 56, 56), 24, 64),
    ((32, 576, 14, 14), 96, 64), ((16, 960, 7, 7), 320, 64),
)  # fmt: skip


def typed(arguments: list[Any], dtype: torch.dtype) -> list[Any]:
    return [on_gpu(a, dtype) for a in arguments]


def with_image(arguments: list[Any], at: int, granularity: int, dtype: torch.dtype) -> list[Any]:
    """Put the image of the weight in place of the packed values at position ``at``."""
    values, _, ptr, columns = arguments[at : at + 4]
    image = tile_image.build(values.to(dtype), ptr, granularity, len(columns))
    return [image if i == at else a for i, a in enumerate(arguments)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", CONVOLUTIONS, ids=str)
def test_tile_conv(shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    keep = min(0.5, 400 / (shape[0][1] * shape[3][0] * shape[3][1]))
    for extras in ({}, {"residual": True, "activation": "relu6"}, {"columns": 0.5}):
        if "columns" in extras and len(shape) == 8:  # with groups every channel is in a tile
            continue
        arguments, y = convolutions.case(*shape, keep=keep, **extras)  # type: ignore[arg-type]
        expected = y.float().to(dtype)
        assert torch.equal(CALL.tile_conv(*typed(arguments, dtype)).cpu(), expected), (shape, extras)
        if dtype != torch.float32:
            imaged = typed(with_image(arguments, 1, shape[2], dtype), dtype)
            assert torch.equal(CALL.tile_conv(*imaged).cpu(), expected), (shape, extras)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", (3, 5, 7))
@pytest.mark.parametrize("shape", PAIRS, ids=str)
def test_dsconv(shape: tuple[Any, ...], kernel: int, dtype: torch.dtype) -> None:
    keep = min(0.5, 150 / shape[0][1])
    for stride in (1, 2):
        arguments, y = pairs.case(*shape, kernel, stride, keep=keep, residual=True, inner="relu6", outer="relu")
        expected = y.float().to(dtype)
        assert torch.equal(CALL.dsconv(*typed(arguments, dtype)).cpu(), expected), (shape, stride)
        if dtype != torch.float32:
            imaged = typed(with_image(arguments, 4, shape[2], dtype), dtype)
            assert torch.equal(CALL.dsconv(*imaged).cpu(), expected), (shape, stride)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", (3, 5, 7, 9))
def test_depthwise_pool(kernel: int, dtype: torch.dtype) -> None:
    for shape in ((2, 5, 7, 7), (33, 3, 14, 14), (1, 4, 56, 56), (2, 2, 37, 136)):
        gen = generator(kernel, *shape)
        channels, count = shape[1], kernel * kernel
        mask = torch.rand(channels, count, generator=gen) < 0.4
        x, weight, bias = integers(gen, *shape), integers(gen, channels, count), integers(gen, channels)
        window = ([kernel] * 2, [1, 1], [kernel // 2] * 2, [1, 1])
        dense = (weight * mask).view(channels, 1, kernel, kernel)
        y = F.relu(F.conv2d(x, dense, bias, 1, kernel // 2, 1, channels)).to(dtype)
        arguments = [on_gpu(a, dtype) for a in (x, weight, bitmap(mask), bias)]
        got, mean = CALL.depthwise_pool(*arguments, *window, "relu")
        sums = y.float().sum((2, 3)) / (shape[2] * shape[3])
        assert torch.equal(got.cpu(), y) and torch.equal(mean.cpu(), sums.to(dtype)), shape
        again: Tensor = CALL.depthwise_pool(*arguments, *window, "relu")[1]
        assert torch.equal(again, mean)
