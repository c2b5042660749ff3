"""``fxprune::depthwise_grad_input`` and ``depthwise_grad_weight``: the gradients of ``depthwise_taps`` over its kept taps.

    dx[b, c, y, x] = sum over kept (dy, dx) of weight[c, dy, dx] * grad[b, c, oy, ox] where oy*s + dy*d - p = y, ...
    dw[c, dy, dx]  = sum over b, oy, ox of grad[b, c, oy, ox] * x[b, c, oy*s + dy*d - p, ...], 0 where the tap is pruned

Compiled for GPUs, where pruned taps cost nothing; elsewhere their references run. Together with ``depthwise_taps`` they
are closed under differentiation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.ops import depthwise_taps
from fxprune.ops.depthwise_taps import tap_mask, window
from fxprune.ops.operator import Args, Operator, widened

aten = torch.ops.aten
OPS = torch.ops.fxprune


def input_reference(
    grad: Tensor,
    weight: Tensor,
    taps: Tensor,
    size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """grad: (B, C, OH, OW); weight: (C, KH*KW); size: of the input, (H, W); returns (B, C, H, W)."""
    count = _check(grad, taps, size, kernel_size, stride, padding, dilation)
    _check_shape("weight", weight.shape, (grad.shape[1], count))
    g, w = widened(grad.contiguous(), weight)
    x = g.new_empty((*g.shape[:2], *size))
    geometry = (stride, padding, dilation, False, [0, 0], g.shape[1], [True, False, False])
    dx, _, _ = aten.convolution_backward.default(g, x, window(w, taps, kernel_size), None, *geometry)
    return dx.to(grad.dtype).contiguous()


def input_fake(
    grad: Tensor,
    weight: Tensor,
    taps: Tensor,
    size: list[int],
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    return grad.new_empty((*grad.shape[:2], *size))


def input_context(ctx: Any, inputs: Args, output: Tensor) -> None:
    grad, weight, taps, _, *ctx.geometry = inputs
    ctx.save_for_backward(grad, weight, taps)


def input_backward(ctx: Any, g: Tensor) -> Args:
    grad, weight, taps = ctx.saved_tensors
    first = OPS.depthwise_taps(g, weight, taps, None, *ctx.geometry, "none") if ctx.needs_input_grad[0] else None
    second = OPS.depthwise_grad_weight(grad, g, taps, *ctx.geometry) if ctx.needs_input_grad[1] else None
    return first, second, *[None] * 6


def weight_reference(
    grad: Tensor,
    x: Tensor,
    taps: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    """grad: (B, C, OH, OW); x: (B, C, H, W); returns (C, KH*KW), 0 where a tap is pruned."""
    count = _check(grad, taps, kernel_size, stride, padding, dilation)
    _check_shape("x", x.shape[:2], tuple(grad.shape[:2]))
    g, wide = widened(grad.contiguous(), x.contiguous())
    dense = g.new_empty((g.shape[1], 1, *kernel_size))
    geometry = (stride, padding, dilation, False, [0, 0], g.shape[1], [False, True, False])
    _, dw, _ = aten.convolution_backward.default(g, wide, dense, None, *geometry)
    kept = tap_mask(taps, count)
    return torch.where(kept, dw.reshape(-1, count), dw.new_zeros(())).to(grad.dtype)


def weight_fake(
    grad: Tensor,
    x: Tensor,
    taps: Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
) -> Tensor:
    return grad.new_empty((grad.shape[1], kernel_size[0] * kernel_size[1]))


def weight_context(ctx: Any, inputs: Args, output: Tensor) -> None:
    grad, x, taps, *ctx.geometry = inputs
    ctx.save_for_backward(grad, x, taps)


def weight_backward(ctx: Any, g: Tensor) -> Args:
    grad, x, taps = ctx.saved_tensors
    first = OPS.depthwise_taps(x, g, taps, None, *ctx.geometry, "none") if ctx.needs_input_grad[0] else None
    second = None
    if ctx.needs_input_grad[1]:
        second = OPS.depthwise_grad_input(grad, g, taps, list(x.shape[2:]), *ctx.geometry)
    return first, second, *[None] * 5


def _check(grad: Tensor, taps: Tensor, *geometry: list[int]) -> int:
    """Return the taps of a window. geometry: pairs of height and width that end with kernel, stride, padding, dilation."""
    if grad.dim() != 4:
        raise RuntimeError(f"grad must have shape (B, C, OH, OW), got {tuple(grad.shape)}")
    if any(len(pair) != 2 for pair in geometry):
        raise RuntimeError(f"sizes must be pairs of height and width, got {list(geometry)}")
    count = math.prod(geometry[-4])
    _check_shape("taps", taps.shape, (grad.shape[1], -(-count // 64)))
    return count


def _check_shape(name: str, given: Sequence[int], expected: tuple[int, ...]) -> None:
    if tuple(given) != expected:
        raise RuntimeError(f"{name} must have shape {expected} there, got {tuple(given)}")


def _cases() -> Iterator[tuple[Args, Args]]:
    """Yield arguments of both operators, made from samples of the convolution."""
    for x, weight, taps, _, *geometry, _ in depthwise_taps.samples():
        y = depthwise_taps.fake(x, weight, taps, None, *geometry)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(x.numel())).to(x.dtype)
        yield (grad, weight.to(x.dtype), taps, list(x.shape[2:]), *geometry), (grad, x, taps, *geometry)


def input_samples() -> Iterator[Args]:
    yield from (case[0] for case in _cases())


def weight_samples() -> Iterator[Args]:
    yield from (case[1] for case in _cases())


def input_bad_samples() -> Iterator[tuple[Args, str]]:
    grad, weight, *rest = next(input_samples())
    yield (grad[0], weight, *rest), r"grad must have shape"
    yield (grad, weight[:, :-1], *rest), r"weight must have shape"


def weight_bad_samples() -> Iterator[tuple[Args, str]]:
    grad, x, *rest = next(weight_samples())
    yield (grad[0], x, *rest), r"grad must have shape"
    yield (grad, x[:, :-1], *rest), r"x must have shape"


INPUT = Operator(
    "depthwise_grad_input", input_reference, input_fake, input_context, input_backward, input_samples, input_bad_samples
)
WEIGHT = Operator(
    "depthwise_grad_weight", weight_reference, weight_fake, weight_context, weight_backward, weight_samples,
    weight_bad_samples,
)  # fmt: skip
