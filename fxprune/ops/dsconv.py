"""``fxprune::dsconv``: a depthwise convolution and the 1x1 convolution that reads it, as one kernel.

    y = tile_gemm(depthwise_taps(x, weight, taps, ...), values, index, tile_ptr, columns, bias, residual)

``depthwise_bias`` and ``depthwise_activation`` belong to the first part, ``bias``, ``residual`` and ``activation`` to the
second; what lies between the two is rounded to x's type. On a GPU it never reaches device memory: a block of threads
holds all channels of 8x8 pixels. Made by ``lowering/fuse_dsconv.py`` for inference; in training the parts stay apart. Its
gradient is theirs, over kept taps and kept weights, with what lies between computed anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fxprune.ops import depthwise_taps, tile_gemm, tile_pack
from fxprune.ops.operator import Args, Operator


def reference(
    x: Tensor,
    weight: Tensor,
    taps: Tensor,
    depthwise_bias: Tensor | None,
    values: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out_features: int,
    granularity: int,
    depthwise_activation: str = "none",
    activation: str = "none",
) -> Tensor:
    """x: (B, C, H, W); weight: (C, KH*KW); the packed weight is (N, C); returns (B, N, OH, OW) contiguous."""
    window = (kernel_size, stride, padding, dilation)
    between = depthwise_taps.reference(x, weight, taps, depthwise_bias, *window, depthwise_activation)
    packed = (values, index, tile_ptr, columns)
    return tile_gemm.reference(between, *packed, bias, residual, None, out_features, granularity, 1, activation)


def fake(
    x: Tensor,
    weight: Tensor,
    taps: Tensor,
    depthwise_bias: Tensor | None,
    values: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    out_features: int,
    granularity: int,
    depthwise_activation: str = "none",
    activation: str = "none",
) -> Tensor:
    between = depthwise_taps.fake(x, weight, taps, depthwise_bias, kernel_size, stride, padding, dilation)
    return x.new_empty((x.shape[0], out_features, *between.shape[2:]))


def setup_context(ctx: Any, inputs: Args, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:10])
    ctx.window, ctx.out_features, ctx.granularity = inputs[10:14], inputs[14], inputs[15]
    ctx.activations = inputs[16:]


def backward(ctx: Any, grad: Tensor) -> Args:
    x, weight, taps, first_bias, values, index, tile_ptr, columns, bias, residual = ctx.saved_tensors
    first, second = ctx.activations
    need = ctx.needs_input_grad
    between = torch.ops.fxprune.depthwise_taps(x, weight, taps, first_bias, *ctx.window, first)
    gemm = SimpleNamespace(
        saved_tensors=(between, values, index, tile_ptr, columns, bias, residual, None),
        needs_input_grad=(any((need[0], need[1], need[3])), need[4], False, False, False, need[8], need[9], False),
        out_features=ctx.out_features, granularity=ctx.granularity, feature_dim=1, activation=second,
    )  # fmt: skip
    grad_between, grad_values, _, _, _, grad_bias, grad_residual, *_ = tile_gemm.backward(gemm, grad)
    inputs: tuple[Tensor | None, ...] = (None,) * 4
    if grad_between is not None:
        kernel_size, stride, padding, dilation = ctx.window
        depthwise = SimpleNamespace(
            saved_tensors=(x, weight, taps, first_bias), needs_input_grad=need[:4], kernel_size=kernel_size, stride=stride,
            padding=padding, dilation=dilation, activation=first,
        )  # fmt: skip
        inputs = depthwise_taps.backward(depthwise, grad_between)[:4]
    return *inputs, grad_values, None, None, None, grad_bias, grad_residual, *[None] * 8


def _sample(
    shape: tuple[int, int, int, int], n: int, g: int, kernel: int, stride: int, names: tuple[str, str], extras: str = ""
) -> Args:
    gen = torch.Generator().manual_seed(sum(shape) * 13 + n * 5 + kernel)
    weight, taps = depthwise_taps.random_taps(shape[1], kernel * kernel, gen)
    packed = tile_pack.random_structure(n, shape[1], g, gen)
    size = [(side - 1) // stride + 1 for side in shape[2:]]
    first = torch.randn(shape[1], generator=gen) if "d" in extras else None
    bias = torch.randn(n, generator=gen) if "b" in extras else None
    residual = torch.randn(shape[0], n, *size, generator=gen) if "r" in extras else None
    window = ([kernel] * 2, [stride] * 2, [kernel // 2] * 2, [1, 1])
    return torch.randn(*shape, generator=gen), weight, taps, first, *packed, bias, residual, *window, n, g, *names


def samples() -> Iterator[Args]:
    yield _sample((1, 6, 7, 9), 8, 4, 3, 1, ("none", "none"), "db")
    yield _sample((2, 9, 8, 5), 10, 4, 3, 2, ("relu6", "none"), "dbr")
    yield _sample((1, 5, 9, 9), 7, 64, 5, 1, ("relu", "none"), "d")
    yield _sample((2, 3, 10, 11), 70, 64, 7, 2, ("none", "gelu"), "r")


def bad_samples() -> Iterator[tuple[Args, str]]:
    good = list(_sample((1, 6, 7, 9), 8, 4, 3, 1, ("none", "none"), "db"))

    def broken(position: int, value: Any) -> Args:
        return tuple(value if i == position else a for i, a in enumerate(good))

    yield broken(0, good[0].double()), r"float"
    yield broken(0, good[0][0]), r"x must have shape"
    yield broken(1, good[1][:, :-1]), r"weight must have shape"
    yield broken(3, good[3][:2]), r"bias"
    yield broken(6, good[6][:-1]), r"tile_ptr"
    yield broken(8, good[8][:3]), r"bias"
    yield broken(9, good[0]), r"residual"
    yield broken(10, [3]), r"kernel_size"
    yield broken(11, [0, 1]), r"stride"
    yield broken(15, 0), r"granularity"
    yield broken(16, "swish"), r"activation"
    yield broken(17, "swish"), r"activation"


OPERATOR = Operator("dsconv", reference, fake, setup_context, backward, samples, bad_samples)
