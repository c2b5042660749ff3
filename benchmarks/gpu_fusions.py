"""Rows of bench_gpu.py for the operators beside the plain convolution and GEMM: pairs, pooling, windows, gradients.

Each is timed against its parts by our own kernels ("ours apart") and the best of PyTorch's. Predictions are shares of bytes
that no longer move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import Rivals, Row, row, share
from torch import Tensor

from fxprune.ops import cuda_tile_image as tile_image
from fxprune.ops.depthwise_taps import random_taps
from fxprune.ops.tile_pack import random_structure

DEVICE = "cuda"
DTYPE = torch.bfloat16
CALL = torch.ops.fxprune
# batch, channels, side, features, kernel, stride: pairs of MobileNetV2 and EfficientNet-B0
PAIRS = (
    (256, 144, 56, 24, 3, 1),
    (256, 144, 56, 32, 3, 2),
    (32, 576, 14, 96, 3, 1),
    (32, 240, 28, 40, 5, 1),
    (1, 144, 56, 24, 3, 1),
)
POOLS = ((32, 240, 28, 5, 1), (256, 480, 14, 3, 1), (256, 1152, 7, 5, 1))
WINDOWS = ((32, 64, 56, 64, 3, 1), (32, 128, 28, 128, 3, 1), (1, 256, 14, 256, 3, 1))
GRADIENTS = ((32, 4096, 4), (32, 4096, 16))
# rows, K, N of data gradients: wide linear layers, where pruning them to 2:4 may pay
WIDE = ((4096, 3072, 768), (4096, 4096, 4096), (8192, 8192, 2048))
# tokens and width of training steps, and what pruning their data gradients is to make of the step where sparse products
# run at 1.2 times the dense rate and the gradient is pruned and packed in a pass of its own
STEPS = ((8192, 1024, 1.0), (8192, 4096, 1.033))
# tokens, K, N, share of kept K rows: BERT-base
LINEARS = ((4096, 768, 3072, 0.5), (4096, 768, 3072, 0.3), (4096, 3072, 768, 0.3))


def fusion_rows(ceilings: dict[str, float]) -> Iterator[Row]:
    for pair in PAIRS:
        yield pair_row(*pair)
    for pool in POOLS:
        yield pool_row(*pool)
    for window in WINDOWS:
        yield window_row(*window)
    for kernel in (3, 7):
        yield backward_row(32, 96, 56, kernel)
    for window in WINDOWS[:2]:
        yield window_backward_row(*window)
    for linear in LINEARS:
        yield linear_backward_row(*linear)
    for wide in WIDE:
        yield sparse_row(*wide)
    for step in STEPS:
        yield step_row(*step)
    for function in ("magnitude", "rescaled_magnitude", "mvue"):
        for rows, channels, m in GRADIENTS:
            yield prune_row(128 * rows, channels, m, function, ceilings)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape).to(DEVICE, DTYPE)


def depthwise(channels: int, kernel: int) -> tuple[Tensor, Tensor]:
    weight, taps = random_taps(channels, kernel * kernel, torch.Generator().manual_seed(0))
    return weight.to(DEVICE, DTYPE), taps.to(DEVICE)


def packed(n: int, k: int, g: int) -> list[Tensor]:
    """Return the operands of a random tile-wise weight, 16-bit values as the image that inference packs."""
    values, index, ptr, columns = random_structure(n, k, g, torch.Generator().manual_seed(0))
    values = values.to(DTYPE)
    if torch.float32 != DTYPE:
        values = tile_image.build(values, ptr, g, len(columns))
    return [t.to(DEVICE) for t in (values, index, ptr, columns)]


def windows(kernel: int, stride: int) -> list[list[int]]:
    return [[kernel] * 2, [stride] * 2, [kernel // 2] * 2, [1, 1]]


def pair_row(batch: int, channels: int, side: int, n: int, kernel: int, stride: int) -> Row:
    x, (weight, taps), weights = random(batch, channels, side, side), depthwise(channels, kernel), packed(n, channels, 64)
    dense, point, window = weight.view(channels, 1, kernel, kernel), random(n, channels, 1, 1), windows(kernel, stride)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, dense, point)]

    def apart() -> Tensor:
        between = CALL.depthwise_taps(x, weight, taps, None, *window, "relu6")
        return CALL.tile_gemm(between, *weights, None, None, None, n, 64, 1, "none")

    rivals = Rivals()
    fused = (x, weight, taps, None, *weights, None, None, *window, n, 64, "relu6", "none")
    rivals.add("ours", lambda: lambda: CALL.dsconv(*fused))
    rivals.add("apart (ours)", lambda: apart)
    rivals.add("nchw", lambda: convolutions(x, dense, point, kernel, stride))
    rivals.add("nhwc", lambda: convolutions(*last, kernel, stride))
    return row(f"dsconv b{batch} {channels}@{side}->{n} k{kernel}s{stride}", rivals, 1.5)


def convolutions(x: Tensor, dense: Tensor, point: Tensor, kernel: int, stride: int) -> Callable[[], Tensor]:
    return lambda: F.conv2d(F.relu6(F.conv2d(x, dense, None, stride, kernel // 2, 1, x.shape[1])), point)


def pool_row(batch: int, channels: int, side: int, kernel: int, stride: int) -> Row:
    x, (weight, taps), window = random(batch, channels, side, side), depthwise(channels, kernel), windows(kernel, stride)
    arguments = (x, weight, taps, None, *window, "silu")
    dense = weight.view(channels, 1, kernel, kernel)

    def pooled(y: Tensor) -> tuple[Tensor, Tensor]:
        return y, y.mean((2, 3))

    rivals = Rivals()
    rivals.add("ours", lambda: lambda: CALL.depthwise_pool(*arguments))
    rivals.add("apart (ours)", lambda: lambda: pooled(CALL.depthwise_taps(*arguments)))
    rivals.add("nchw", lambda: lambda: pooled(F.silu(F.conv2d(x, dense, None, stride, kernel // 2, 1, channels))))
    return row(f"pool b{batch} {channels}@{side} k{kernel}s{stride}", rivals, 1.4)


def window_row(batch: int, channels: int, side: int, n: int, kernel: int, stride: int) -> Row:
    x, window = random(batch, channels, side, side), windows(kernel, stride)
    weights, dense = packed(n, channels * kernel * kernel, 64), random(n, channels, kernel, kernel)
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, dense)]
    rivals = Rivals()
    rivals.add("ours", lambda: lambda: CALL.tile_conv(x, *weights, None, None, n, 64, *window, 1, "none"))
    rivals.add("nchw", lambda: lambda: F.conv2d(x, dense, None, stride, kernel // 2))
    rivals.add("nhwc", lambda: lambda: F.conv2d(*last, None, stride, kernel // 2))
    return row(f"conv b{batch} {channels}@{side}->{n} k{kernel}s{stride} keep 60%", rivals, None)


def backward_row(batch: int, channels: int, side: int, kernel: int) -> Row:
    x, grad, (weight, taps) = (
        random(batch, channels, side, side), random(batch, channels, side, side), depthwise(channels, kernel),
    )  # fmt: skip
    dense, window = weight.view(channels, 1, kernel, kernel), windows(kernel, 1)

    def ours() -> Any:
        data = CALL.depthwise_grad_input(grad, weight, taps, [side, side], *window)
        return data, CALL.depthwise_grad_weight(grad, x, taps, *window)

    rest = ([1, 1], [kernel // 2] * 2, [1, 1], False, [0, 0], channels, [True, True, False])
    rivals = Rivals()
    rivals.add("ours", lambda: ours)
    rivals.add("pytorch", lambda: lambda: torch.ops.aten.convolution_backward(grad, x, dense, None, *rest))
    return row(f"depthwise backward b{batch} {channels}@{side} k{kernel} keep 60%", rivals, None)


def window_backward_row(batch: int, channels: int, side: int, n: int, kernel: int, stride: int) -> Row:
    x, grad, window = random(batch, channels, side, side), random(batch, n, side, side), windows(kernel, stride)
    k, gen = channels * kernel * kernel, torch.Generator().manual_seed(0)
    values, *lists = random_structure(n, k, 64, gen)
    values, structure = values.to(DEVICE, DTYPE), [t.to(DEVICE) for t in lists]
    dense = random(n, channels, kernel, kernel)

    def ours() -> Any:
        data = CALL.tile_conv_grad_input(grad, values, *structure, 64, channels, [side, side], *window, 1)
        return data, CALL.tile_conv_grad_weight(grad, x, *structure, 64, len(values), *window, 1)

    rest = ([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], 1, [True, True, False])
    last = [t.contiguous(memory_format=torch.channels_last) for t in (grad, x, dense)]
    rivals = Rivals()
    rivals.add("ours", lambda: ours)
    rivals.add("nchw", lambda: lambda: torch.ops.aten.convolution_backward(grad, x, dense, None, *rest))
    rivals.add("nhwc", lambda: lambda: torch.ops.aten.convolution_backward(*last, None, *rest))
    return row(f"conv backward b{batch} {channels}@{side}->{n} k{kernel} keep 48%", rivals, None)


def linear_backward_row(tokens: int, k: int, n: int, keep: float) -> Row:
    """Feature-major, G = 128."""
    x, grad, dense, gen = random(1, k, tokens), random(1, n, tokens), random(n, k), torch.Generator().manual_seed(0)
    lists = [torch.randperm(k, generator=gen)[: int(k * keep)].sort().values for _ in range(n // 128)]
    ptr = torch.arange(len(lists) + 1) * int(k * keep)
    structure = [t.int().to(DEVICE) for t in (torch.cat(lists), ptr, torch.arange(n))]
    values = random(128 * len(lists) * int(k * keep))

    def ours() -> Any:
        data = CALL.tile_grad_input(grad, values, *structure, 128, k, 1)
        return data, CALL.tile_grad_weight(grad, x, *structure, 128, len(values), 1)

    rivals = Rivals()
    rivals.add("ours", lambda: ours)
    rivals.add("cublas", lambda: lambda: (dense.t() @ grad[0], grad[0] @ x[0].t()))
    return row(f"linear backward {tokens}x{k}->{n} keep {keep:.0%}", rivals, None)


def sparse_row(rows: int, k: int, n: int) -> Row:
    """A product pruned to 2:4, pruning and packing included; rivals multiply densely, or prune, compress and multiply."""
    grad, weight = random(rows, k), random(k, n)

    def compressed() -> Callable[[], Tensor]:
        def call() -> Tensor:
            pruned = CALL.nm_prune(grad, None, 2, 4, -1, 1, "magnitude", 0)
            return torch._cslt_sparse_mm(torch._cslt_compress(pruned), weight)

        right = CALL.nm_prune(grad, None, 2, 4, -1, 1, "magnitude", 0) @ weight
        torch.testing.assert_close(call(), right, rtol=2e-2, atol=2e-2 * float(right.abs().max()))
        return call

    rivals = Rivals()
    rivals.add("ours", lambda: lambda: CALL.nm_mm(grad, weight))
    rivals.add("cublas", lambda: lambda: grad @ weight)
    rivals.add("cusparselt", compressed)
    # the dense product at 1.2 times the rate, and 3.25 bytes of each element of the gradient that move besides
    return row(f"2:4 product {rows}x{k}->{n}", rivals, round(1 / (1 / 1.2 + 287 / n), 2))


def step_row(tokens: int, width: int, predicted: float) -> Row:
    """Forward and backward of two linear layers, their data gradients pruned 2:4 where that was measured to pay."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(2))).to(DEVICE, DTYPE)
    x, grad = random(tokens, width).requires_grad_(), random(tokens, width)
    leaves = [x, *layers.parameters()]
    torch._dynamo.reset()

    def step(**how: Any) -> Callable[[], Any]:
        run = torch.compile(layers, dynamic=False, **how)

        def call() -> Any:
            with torch.enable_grad():
                return torch.autograd.grad(run(x), leaves, grad)

        return call

    rivals = Rivals()
    rivals.add("ours", lambda: step(backend="hwprune", options={"grad_sparsity": "auto:2:4"}))
    rivals.add("inductor", step)
    return row(f"step of two linear layers, {tokens} tokens, {width} wide, gradients 2:4", rivals, predicted)


def prune_row(rows: int, channels: int, m: int, function: str, ceilings: dict[str, float]) -> Row:
    grad, key = random(rows, channels), torch.tensor([1, 2, 3]).to(DEVICE)
    rivals = Rivals()
    rivals.add("ours", lambda: lambda: CALL.nm_prune(grad, key, m // 2, m, -1, 1, function, 0))
    rivals.add("copy", lambda: lambda: grad.clone())
    moved = 2 * grad.numel() * grad.element_size()
    name = f"nm_prune {rows}x{channels} {m // 2}:{m} {function}"
    return row(name, rivals, 1.0, copy_share=lambda us: share(moved / us * 1e-6, ceilings["copy_tb_s"]))
