"""``fxprune::depthwise_pool``: a depthwise convolution over kept taps, and the mean of each of its planes.

    y = depthwise_taps(x, weight, taps, ...),  mean[b, c] = (sum of y[b, c]) / (OH * OW)

The mean is what squeeze-and-excite asks for next: the kernel that holds the results adds them up, as they are stored, in
float32 and in a fixed order. Made by ``lowering/fuse_pool.py`` for inference.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from fxprune.ops import depthwise_taps
from fxprune.ops.operator import Args, Operator, without_gradient


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
) -> list[Tensor]:
    """x: (B, C, H, W); weight: (C, KH*KW); taps: int64 bit words; returns (B, C, OH, OW) and (B, C)."""
    y = depthwise_taps.reference(x, weight, taps, bias, kernel_size, stride, padding, dilation, activation)
    return [y, y.mean((2, 3))]


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
) -> list[Tensor]:
    y = depthwise_taps.fake(x, weight, taps, bias, kernel_size, stride, padding, dilation, activation)
    return [y, x.new_empty(x.shape[:2])]


def samples() -> Iterator[Args]:
    yield from depthwise_taps.samples()


def bad_samples() -> Iterator[tuple[Args, str]]:
    yield from depthwise_taps.bad_samples()


OPERATOR = Operator("depthwise_pool", reference, fake, *without_gradient("depthwise_pool"), samples, bad_samples)
