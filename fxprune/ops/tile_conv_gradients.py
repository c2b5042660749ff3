"""``fxprune::tile_conv_grad_input`` and ``tile_conv_grad_weight``: the gradients of ``tile_conv`` over its kept weights.

The weight's gradient is packed as the weight is; a pruned weight has none. Compiled for GPUs; elsewhere their references
run. Together with ``tile_conv`` they are closed under differentiation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fxprune.ops import tile_pack
from fxprune.ops.operator import Args, Operator, widened

aten = torch.ops.aten
OPS = torch.ops.fxprune


def dense_input(
    grad: Tensor,
    values: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    granularity: int,
    in_channels: int,
    size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    unpack: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The input's gradient of the masked dense convolution; ``unpack`` makes the weight (by default ``tile_unpack``)."""
    n, channels = grad.shape[1], in_channels // groups
    shape = (granularity, n, channels * math.prod(kernel_size))
    weight = (unpack or OPS.tile_unpack)(values, index, tile_ptr, columns, *shape).reshape(n, channels, *kernel_size)
    x = grad.new_empty((grad.shape[0], in_channels, *size))
    geometry = (stride, padding, dilation, False, [0, 0], groups)
    dx: Tensor = aten.convolution_backward.default(grad, x, weight, None, *geometry, [True, False, False])[0]
    return dx


def dense_weight(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    granularity: int,
    nnz: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    pack: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The weight's gradient of the dense convolution, packed by ``pack`` (by default ``tile_pack``)."""
    weight = grad.new_empty((grad.shape[1], x.shape[1] // groups, *kernel_size))
    geometry = (stride, padding, dilation, False, [0, 0], groups)
    dw = aten.convolution_backward.default(grad, x, weight, None, *geometry, [False, True, False])[1]
    matrix = dw.reshape(grad.shape[1], -1)
    return (pack or OPS.tile_pack)(matrix, index, tile_ptr, columns, granularity, nnz)


def input_reference(
    grad: Tensor,
    values: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    granularity: int,
    in_channels: int,
    size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """grad: (B, N, OH, OW); values: (nnz,); size: of the input, (H, W); returns (B, in_channels, H, W)."""
    _check(grad, in_channels, groups, size, kernel_size, stride, padding, dilation)
    g, w = widened(grad.contiguous(), values)
    structure = (index, tile_ptr, columns, granularity)
    dx = dense_input(
        g, w, *structure, in_channels, size, kernel_size, stride, padding, dilation, groups, tile_pack.unpack_reference
    )
    return dx.to(grad.dtype).contiguous()


def input_fake(
    grad: Tensor,
    values: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    granularity: int,
    in_channels: int,
    size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return grad.new_empty((grad.shape[0], in_channels, *size))


def input_context(ctx: Any, inputs: Args, output: Tensor) -> None:
    *tensors, ctx.granularity, _, _ = inputs[:8]
    ctx.window = inputs[8:]
    ctx.save_for_backward(*tensors)


def input_backward(ctx: Any, g: Tensor) -> Args:
    grad, values, *structure = ctx.saved_tensors
    structure.append(ctx.granularity)
    first = _forward(g, values, structure, grad.shape[1], ctx.window) if ctx.needs_input_grad[0] else None
    second = None
    if ctx.needs_input_grad[1]:
        second = OPS.tile_conv_grad_weight(grad, g, *structure, values.shape[0], *ctx.window)
    return first, second, *[None] * 11


def weight_reference(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    granularity: int,
    nnz: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """grad: (B, N, OH, OW); x: (B, C, H, W); returns the packed (nnz,)."""
    if x.dim() != 4:
        raise RuntimeError(f"x must have shape (B, C, H, W), got {tuple(x.shape)}")
    _check(grad, x.shape[1], groups, kernel_size, stride, padding, dilation)
    g, wide = widened(grad.contiguous(), x.contiguous())
    structure = (index, tile_ptr, columns, granularity)
    dw = dense_weight(g, wide, *structure, nnz, kernel_size, stride, padding, dilation, groups, tile_pack.pack_reference)
    return dw.to(grad.dtype)


def weight_fake(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    granularity: int,
    nnz: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    return grad.new_empty((nnz,))


def weight_context(ctx: Any, inputs: Args, output: Tensor) -> None:
    *tensors, ctx.granularity, _ = inputs[:7]
    ctx.window = inputs[7:]
    ctx.save_for_backward(*tensors)


def weight_backward(ctx: Any, g: Tensor) -> Args:
    grad, x, *structure = ctx.saved_tensors
    structure.append(ctx.granularity)
    first = _forward(x, g, structure, grad.shape[1], ctx.window) if ctx.needs_input_grad[0] else None
    second = None
    if ctx.needs_input_grad[1]:
        second = OPS.tile_conv_grad_input(grad, g, *structure, x.shape[1], list(x.shape[2:]), *ctx.window)
    return first, second, *[None] * 10


def _forward(x: Tensor, values: Tensor, structure: list[Any], out_features: int, window: Args) -> Tensor:
    *lists, granularity = structure
    y: Tensor = OPS.tile_conv(x, values, *lists, None, None, out_features, granularity, *window, "none")
    return y


def _check(grad: Tensor, in_channels: int, groups: int, *pairs: list[int]) -> None:
    if grad.dim() != 4:
        raise RuntimeError(f"grad must have shape (B, N, OH, OW), got {tuple(grad.shape)}")
    if any(len(pair) != 2 for pair in pairs):
        raise RuntimeError(f"sizes must be pairs of height and width, got {list(pairs)}")
    if groups < 1 or in_channels % groups or grad.shape[1] % groups:
        raise RuntimeError(f"groups must divide {in_channels} input and {grad.shape[1]} output channels, got {groups}")


def _cases() -> Iterator[tuple[Args, Args]]:
    """Yield arguments of both operators."""
    for shape, n, g, kernel, (stride, padding, dilation), groups in (
        ((1, 5, 7, 7), 9, 4, (3, 3), (1, 1, 1), 1), ((2, 3, 9, 11), 10, 64, (3, 2), (2, 1, 1), 1),
        ((1, 8, 6, 10), 8, 2, (3, 3), (1, 1, 2), 2),
    ):  # fmt: skip
        gen = torch.Generator().manual_seed(n)
        window = ([*kernel], [stride] * 2, [padding] * 2, [dilation] * 2, groups)
        k = shape[1] // groups * math.prod(kernel)
        values, *structure = tile_pack.random_structure(n, k, g, gen, groups)
        size = [(shape[2 + i] + 2 * padding - dilation * (kernel[i] - 1) - 1) // stride + 1 for i in (0, 1)]
        x, grad = torch.randn(*shape, generator=gen), torch.randn(shape[0], n, *size, generator=gen)
        yield (grad, values, *structure, g, shape[1], [*shape[2:]], *window), (grad, x, *structure, g, len(values), *window)


def input_samples() -> Iterator[Args]:
    yield from (case[0] for case in _cases())


def weight_samples() -> Iterator[Args]:
    yield from (case[1] for case in _cases())


def input_bad_samples() -> Iterator[tuple[Args, str]]:
    grad, values, *rest = next(input_samples())
    yield (grad[0], values, *rest), r"grad must have shape"
    yield (grad, values, *rest[:-1], 2), r"groups must divide"


def weight_bad_samples() -> Iterator[tuple[Args, str]]:
    grad, x, *rest = next(weight_samples())
    yield (grad, x[0], *rest), r"x must have shape"
    yield (grad, x, *rest[:-1], 2), r"groups must divide"


INPUT = Operator(
    "tile_conv_grad_input", input_reference, input_fake, input_context, input_backward, input_samples, input_bad_samples
)
WEIGHT = Operator(
    "tile_conv_grad_weight", weight_reference, weight_fake, weight_context, weight_backward, weight_samples,
    weight_bad_samples,
)  # fmt: skip
