"""``fxprune::depthwise_taps``: a depthwise convolution that reads only its kept taps.

    y[b, c] = act(sum over kept (dy, dx) of weight[c, dy*KW + dx] * x[b, c, oy*s + dy*d - p, ox*s + dx*d - p] + bias[c])

The DR-form of DEPrune (Sec. 4.1) gives every (channel, dy, dx) its own K index; the operator keeps that
index as one bit per tap and never materialises the DR matrix. Activations are float32, or bfloat16 with sums in float32
and one rounding at the end; weight and bias may then be either.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxprune.ops import activation as act
from fxprune.ops.operator import Args, Operator, widened

aten = torch.ops.aten


def tap_mask(taps: Tensor, count: int) -> Tensor:
    """Return the bool mask (C, count) of bit words ``taps`` int64 (C, ceil(count/64))."""
    tap = torch.arange(count, device=taps.device)
    bit = torch.pow(2, tap % 64)  # 2**63 wraps to the sign bit
    return torch.bitwise_and(taps[:, tap // 64], bit) != 0


def window(weight: Tensor, taps: Tensor, kernel_size: list[int]) -> Tensor:
    kept = tap_mask(taps, weight.shape[1])
    return torch.where(kept, weight, weight.new_zeros(())).reshape(-1, 1, *kernel_size)


def reference(
    x: Tensor,
    weight: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str = "none",
) -> Tensor:
    """x: (B, C, H, W); weight: (C, KH*KW); taps: int64 bit words; returns (B, C, OH, OW) contiguous."""
    dtype = x.dtype
    x, weight, bias = widened(x.contiguous(), weight, bias)
    kept = window(weight, taps, kernel_size)
    y = aten.conv2d.default(x, kept, bias, stride, padding, dilation, x.shape[1])
    return act.FORWARD[activation](y).to(dtype).contiguous()


def fake(
    x: Tensor,
    weight: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    activation: str = "none",
) -> Tensor:
    size = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    return x.new_empty((x.shape[0], x.shape[1], *size))


def setup_context(ctx: Any, inputs: Args, output: Tensor) -> None:
    x, weight, taps, bias, ctx.kernel_size, ctx.stride, ctx.padding, ctx.dilation, ctx.activation = inputs
    ctx.save_for_backward(x, weight, taps, bias)


def backward(ctx: Any, grad: Tensor) -> Args:
    x, weight, taps, bias = ctx.saved_tensors
    if ctx.activation != "none":  # in float32: a rounded sum may lie beyond a kink
        x, weight, bias, grad = widened(x, weight, bias, grad)
        geometry = (ctx.kernel_size, ctx.stride, ctx.padding, ctx.dilation)
        pre = torch.ops.fxprune.depthwise_taps(x, weight, taps, bias, *geometry, "none")
        grad = act.BACKWARD[ctx.activation](grad, pre)
    need_x, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    grad_x, grad_weight = (_sparse if grad.is_cuda else _dense)(ctx, grad, x, weight, taps, need_x, need_weight)
    grad_bias = grad.sum((0, 2, 3), dtype=bias.dtype) if bias is not None and ctx.needs_input_grad[3] else None
    gradients = (grad_x if need_x else None, grad_weight, None, grad_bias)
    pairs = zip(gradients, ctx.saved_tensors, strict=True)
    return *(g if g is None else g.to(t.dtype) for g, t in pairs), None, None, None, None, None


def _sparse(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, taps: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients over the kept taps alone, by the kernels of a GPU."""
    window = (ctx.kernel_size, ctx.stride, ctx.padding, ctx.dilation)
    grad, weight = grad.to(x.dtype), weight.to(x.dtype)
    grad_x = grad_weight = None
    if need_x:
        grad_x = torch.ops.fxprune.depthwise_grad_input(grad, weight, taps, list(x.shape[2:]), *window)
    if need_weight:
        grad_weight = torch.ops.fxprune.depthwise_grad_weight(grad, x, taps, *window)
    return grad_x, grad_weight


def _dense(
    ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, taps: Tensor, need_x: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """PyTorch's gradients of the masked dense convolution, that of the weight masked."""
    grad_x, grad_window, _ = aten.convolution_backward.default(
        grad,
        x,
        window(weight.to(x.dtype), taps, ctx.kernel_size),
        None,
        ctx.stride,
        ctx.padding,
        ctx.dilation,
        False,
        [0, 0],
        x.shape[1],
        [need_x, need_weight, False],
    )
    grad_weight = None
    if need_weight:
        kept = tap_mask(taps, weight.shape[1])
        grad_weight = torch.where(kept, grad_window.reshape(weight.shape), grad_window.new_zeros(()))
    return grad_x, grad_weight


def random_taps(channels: int, count: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return (weight, taps) of a random tap mask; for samples and tests."""
    kept = torch.rand(channels, count, generator=gen) < 0.6
    words = torch.zeros(channels, -(-count // 64), dtype=torch.int64)
    for t in range(count):
        words[:, t // 64] |= kept[:, t].long() << (t % 64)
    return torch.randn(channels, count, generator=gen) * kept, words


def _sample(b: int, c: int, h: int, w: int, kernel: tuple[int, int], s: int, p: int, d: int, name: str, bias: bool) -> Args:
    gen = torch.Generator().manual_seed(b * 31 + c * 7 + kernel[0] * 3 + s)
    count = kernel[0] * kernel[1]
    weight, words = random_taps(c, count, gen)
    x = torch.randn(b, c, h, w, generator=gen)
    shift = torch.randn(c, generator=gen) if bias else None
    return x, weight, words, shift, list(kernel), [s, s], [p, p], [d, d], name


def samples() -> Iterator[Args]:
    yield _sample(1, 4, 7, 7, (3, 3), 1, 1, 1, "none", True)
    yield _sample(2, 3, 9, 5, (3, 3), 2, 1, 1, "relu6", True)
    yield _sample(1, 5, 8, 8, (5, 5), 1, 2, 1, "silu", False)
    yield _sample(2, 2, 11, 13, (3, 5), 1, 1, 2, "gelu", True)
    yield _sample(1, 3, 18, 18, (7, 7), 2, 3, 1, "hardswish", True)
    yield _sample(1, 2, 12, 12, (9, 9), 1, 4, 1, "none", False)
    x, *rest = _sample(2, 3, 9, 5, (3, 3), 1, 1, 1, "relu6", True)
    yield x.bfloat16(), *rest


def bad_samples() -> Iterator[tuple[Args, str]]:
    good = list(_sample(1, 4, 7, 7, (3, 3), 1, 1, 1, "none", True))

    def broken(position: int, value: Any) -> Args:
        return tuple(value if i == position else a for i, a in enumerate(good))

    yield broken(0, good[0][0]), r"x"
    yield broken(0, good[0].double()), r"float32"
    yield broken(1, good[1][:, :8]), r"weight"
    yield broken(2, good[2].int()), r"taps"
    yield broken(3, good[3][:3]), r"bias"
    yield broken(4, [3]), r"kernel_size"
    yield broken(5, [0, 1]), r"stride"
    yield broken(8, "swish"), r"activation"


OPERATOR = Operator("depthwise_taps", reference, fake, setup_context, backward, samples, bad_samples)
