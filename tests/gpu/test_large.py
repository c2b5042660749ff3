"""Tensors of more than 2**31 elements: the first and the last image of such a batch give what each gives alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.gpu.place import on_gpu
from tests.integers import bitmap, generator, integers, tiles

pytestmark = pytest.mark.slow
CALL = torch.ops.fxprune
CHANNELS, SIDE = 64, 256
BATCH = 2**31 // (CHANNELS * SIDE * SIDE) + 1
ROOM = 40 << 30  # bytes: a batch, its result, and what row-major operators transpose
WINDOW = ([3, 3], [1, 1], [1, 1], [1, 1])
DTYPE = torch.bfloat16


def depthwise() -> Callable[[Tensor], Tensor]:
    gen = generator(1)
    weight, taps = integers(gen, CHANNELS, 9), bitmap(torch.rand(CHANNELS, 9, generator=gen) < 0.5)
    operands = on_gpu(weight, DTYPE), on_gpu(taps)
    return lambda x: CALL.depthwise_taps(x, *operands, None, *WINDOW, "relu")


def depthwise_gradient() -> Callable[[Tensor], Tensor]:
    gen = generator(2)
    weight, taps = integers(gen, CHANNELS, 9), bitmap(torch.rand(CHANNELS, 9, generator=gen) < 0.5)
    operands = on_gpu(weight, DTYPE), on_gpu(taps)
    return lambda x: CALL.depthwise_grad_input(x, *operands, list(x.shape[2:]), *WINDOW)


def gemm(feature_dim: int) -> Callable[[Tensor], Tensor]:
    packed = [on_gpu(t, DTYPE) for t in tiles(generator(3), CHANNELS, CHANNELS, 128, 0.5)[1]]
    rest = (None, None, None, CHANNELS, 128, feature_dim, "relu")
    if feature_dim == 1:
        return lambda x: CALL.tile_gemm(x, *packed, *rest)
    return lambda x: CALL.tile_gemm(x.view(len(x), -1, CHANNELS), *packed, *rest)


def conv() -> Callable[[Tensor], Tensor]:
    packed = [on_gpu(t, DTYPE) for t in tiles(generator(4), CHANNELS, CHANNELS * 9, 64, 0.2)[1]]
    return lambda x: CALL.tile_conv(x, *packed, None, None, CHANNELS, 64, *WINDOW, 1, "relu")


def pruned() -> Callable[[Tensor], Tensor]:
    return lambda x: CALL.nm_prune(x, None, 2, 4, 1, 1, "magnitude", 0)


CASES = {
    "depthwise_taps": depthwise, "depthwise_grad_input": depthwise_gradient, "tile_gemm": lambda: gemm(1),
    "tile_gemm row-major": lambda: gemm(-1), "tile_conv": conv, "nm_prune": pruned,
}  # fmt: skip


def check(name: str, batch: int, side: int) -> None:
    call = CASES[name]()
    x = on_gpu(torch.zeros(1, CHANNELS, side, side), DTYPE).repeat(batch, 1, 1, 1)
    for at in (0, -1):
        x[at] = on_gpu(integers(generator(at + 5), CHANNELS, side, side), DTYPE)
    y = call(x)
    for at, alone in ((0, x[:1]), (-1, x[-1:])):
        expected = call(alone)[0]
        assert torch.equal(y[at], expected) and bool(expected.any()), (name, at)


@pytest.mark.parametrize("name", CASES)
def test_large(name: str) -> None:
    if torch.cuda.mem_get_info()[0] < ROOM:
        pytest.skip(f"needs {ROOM >> 30} GiB of the GPU's memory")
    check(name, BATCH, SIDE)
    torch.cuda.empty_cache()
