"""The CUDA operators on a GPU: bit for bit on integers, opcheck, CUDA graphs, streams."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.ops import cuda_tf32_image as tf32_image
from fxprune.ops import cuda_tile_image as tile_image
from fxprune.ops import tile_gemm
from fxprune.ops.operator import Operator
from tests.cuda.activations import EXACT, SMOOTH
from tests.cuda.test_tile_gemm import tiles
from tests.gpu import place
from tests.gpu.place import DTYPES, OPERATOR_SAMPLES, in_one_type, on_gpu
from tests.integers import bitmap, generator, integers

CALL = torch.ops.fxprune
PLANES = ((1, 1), (1, 7), (7, 7), (14, 14), (15, 33), (28, 28), (56, 56), (112, 112), (37, 136))
# (batch, K, tokens, N, G): every kernel, and shapes of real layers; in the last two the weights of a tile stay
GEMMS = (
    (1, 40, 8, 8, 8), (2, 33, 49, 70, 64), (1, 100, 136, 200, 128), (8, 96, 196, 576, 64), (4, 1152, 49, 320, 64),
    (1, 768, 4096, 768, 128), (1, 768, 4096, 3072, 256), (1, 3072, 4096, 768, 256), (3, 300, 1000, 384, 128),
    (13, 33, 49, 70, 64), (2, 128, 400, 200, 256),
)  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """Outputs start as NaN, so that what is left unwritten is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def gemm_case(shape: tuple[int, int, int, int, int], extras: str, feature_dim: int = 1) -> tuple[list[Any], Tensor]:
    """Return (arguments in fp32 on the GPU, result before the activation in fp64)."""
    batch, k, m, n, g = shape
    gen = generator(*shape)
    # at most about 400 kept rows: sums of products of [-4, 4] stay small enough to be told apart after rounding
    weight, packed = tiles(gen, n, k, g, min(0.5, 400 / k), 0.9)
    x = integers(gen, batch, k, m) if feature_dim == 1 else integers(gen, batch, m, k)
    out = (batch, n, m) if feature_dim == 1 else (batch, m, n)
    bias = integers(gen, n) if "b" in extras else None
    residual = integers(gen, *out) if "r" in extras else None
    gate = integers(gen, batch, k) if "g" in extras else None
    weight, x, bias, residual, gate = (on_gpu(t) for t in (weight, x, bias, residual, gate))
    rows = x.double() if gate is None else x.double() * gate.double()[:, :, None]
    y = weight.double() @ rows if feature_dim == 1 else rows @ weight.double().t()
    if bias is not None:
        y = y + (bias[:, None] if feature_dim == 1 else bias)
    if residual is not None:
        y = y + residual
    return [x, *(on_gpu(t) for t in packed), bias, residual, gate, n, g, feature_dim], y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kernel", (1, 3, 5, 7, 9))
def test_depthwise(kernel: int, dtype: torch.dtype) -> None:
    for plane in PLANES:
        for stride in (1, 2):
            for keep, batch in ((0.3, 3), (1.0, 33 if plane[0] <= 14 else 1)):
                gen = generator(kernel, stride, *plane)
                channels, count = 5, kernel * kernel
                mask = torch.rand(channels, count, generator=gen) < keep
                x, weight = integers(gen, batch, channels, *plane), integers(gen, channels, count)
                bias = integers(gen, channels)
                window = [[kernel] * 2, [stride] * 2, [kernel // 2] * 2, [1, 1]]
                y = F.conv2d(x, (weight * mask).view(channels, 1, kernel, kernel), bias, *window[1:], channels)
                got = CALL.depthwise_taps(
                    *(on_gpu(t, dtype) for t in (x, weight)), on_gpu(bitmap(mask)), on_gpu(bias, dtype), *window, "relu"
                )
                assert torch.equal(got.cpu(), F.relu(y).to(dtype)), (plane, stride, keep)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GEMMS, ids=str)
def test_tile_gemm(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    for extras, feature_dim in (("", 1), ("br", 1), ("bg", 1), ("br", -1)):
        arguments, y = gemm_case(shape, extras, feature_dim)
        got = CALL.tile_gemm(*(on_gpu(a, dtype) for a in arguments), "relu")
        assert torch.equal(got, F.relu(y).float().to(dtype)), (shape, extras, feature_dim)
        if dtype != torch.float32:
            values, _, ptr, columns = (a.cpu() for a in arguments[1:5])
            image = tile_image.build(values.to(dtype), ptr, shape[4], len(columns)).cuda()
            assert torch.equal(
                CALL.tile_gemm(*(on_gpu(a, dtype) for a in (arguments[0], image, *arguments[2:])), "relu"), got
            )


@pytest.mark.parametrize("shape", GEMMS, ids=str)
def test_tile_gemm_in_tf32(shape: tuple[int, int, int, int, int]) -> None:
    for extras, feature_dim in (("", 1), ("brg", 1), ("br", -1)):
        arguments, y = gemm_case(shape, extras, feature_dim)
        # the image is a GPU's alone
        image = arguments[1] if place.DEVICE == "cpu" else on_gpu(tf32_image.build(arguments[1].cpu()))
        got = CALL.tile_gemm(arguments[0], image, *arguments[2:], "relu")
        assert torch.equal(got, F.relu(y).float()), (shape, extras, feature_dim)


@pytest.mark.parametrize("activation", (*EXACT, *SMOOTH))
def test_activations(activation: str) -> None:
    for dtype in DTYPES:
        arguments, y = gemm_case((1, 100, 136, 200, 128), "b")
        got = CALL.tile_gemm(*(on_gpu(a, dtype) for a in arguments), activation)
        torch.testing.assert_close(got, (EXACT | SMOOTH)[activation](y.float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_repeat(dtype: torch.dtype) -> None:
    """Many runs of the pipelined kernels give the same bits: a missing fence would show now and then."""
    for shape in GEMMS[5:8]:
        arguments, y = gemm_case(shape, "b")
        operands = [on_gpu(a, dtype) for a in arguments]
        expected = y.float().to(dtype)
        for _ in range(50):
            assert torch.equal(CALL.tile_gemm(*operands, "none"), expected)


@pytest.mark.parametrize(("op", "args"), OPERATOR_SAMPLES)
def test_opcheck(op: Operator, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(getattr(CALL, op.name).default, in_one_type(args))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_graphs_and_no_synchronisation(dtype: torch.dtype) -> None:
    for shape in (GEMMS[1], GEMMS[8]):
        arguments, _ = gemm_case(shape, "b")
        operands = [on_gpu(a, dtype) for a in arguments]
        x = operands[0]
        expected = CALL.tile_gemm(*operands, "relu")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            CALL.tile_gemm(*operands, "relu")
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = CALL.tile_gemm(*operands, "relu")
        graph.replay()
        assert torch.equal(result, expected)
        x.mul_(2)
        graph.replay()
        assert torch.equal(result, CALL.tile_gemm(*operands, "relu"))


def test_current_stream() -> None:
    arguments, y = gemm_case(GEMMS[6], "")
    operands = [on_gpu(a, torch.bfloat16) for a in arguments]
    stream = torch.cuda.Stream()
    x = torch.zeros_like(operands[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        x.copy_(operands[0])
        result = CALL.tile_gemm(x, *operands[1:], "none")
    stream.synchronize()
    assert torch.equal(result, y.float().bfloat16())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device() -> None:
    arguments, y = gemm_case(GEMMS[2], "")
    operands = [a.to("cuda:1") if isinstance(a, Tensor) else a for a in arguments]
    assert torch.equal(CALL.tile_gemm(*operands, "none").cpu(), y.float().cpu())


def test_wrong_arguments_are_refused() -> None:
    args = [on_gpu(a) for a in next(tile_gemm.samples())]
    with pytest.raises(RuntimeError, match="on the GPU of x"):
        CALL.tile_gemm(args[0], args[1].cpu(), *args[2:])
    with pytest.raises(RuntimeError, match="type of x"):
        CALL.tile_gemm(args[0], args[1].half(), *args[2:])
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        CALL.tile_gemm(args[0].double(), *args[1:])
