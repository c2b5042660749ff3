"""``fxprune::channel_norm``: LayerNorm over the channels of each pixel, on feature-major activations.

    y[b, c, p] = (x[b, c, p] - mean[b, p]) / sqrt(variance[b, p] + eps) * weight[c] + bias[c]

Mean and (biased) variance are over the channels, in float32 for bfloat16 as well. Made by ``passes/fuse_transpose.py``
for inference, where a channels-last chain is run feature-major (ConvNeXt).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxprune.ops.operator import Args, Operator, widened, without_gradient


def reference(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x: (B, C, *spatial), float32 or bfloat16; weight, bias: (C,) or None; returns the shape of x, contiguous."""
    wide, weight, bias = widened(x, weight, bias)
    last = torch.nn.functional.layer_norm(wide.movedim(1, -1), [x.shape[1]], weight, bias, eps)
    return last.movedim(-1, 1).to(x.dtype).contiguous()


def fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return x.new_empty(x.shape)


def samples() -> Iterator[Args]:
    gen = torch.Generator().manual_seed(0)
    for shape, shifted in (((1, 6, 4, 4), True), ((2, 5, 7, 3), False), ((1, 33, 9), True)):
        weight, bias = torch.randn(2, shape[1], generator=gen)
        yield torch.randn(shape, generator=gen), weight, bias if shifted else None, 1e-6


def bad_samples() -> Iterator[tuple[Args, str]]:
    x, weight, bias, eps = next(samples())
    yield (x[0, 0], weight, bias, eps), r"\(B, C, \*spatial\)"
    yield (x, weight[:-1], bias, eps), r"weight must have shape"
    yield (x, weight, bias[:-1], eps), r"bias must have shape"
    yield (x, weight, bias, -1.0), r"eps must be at least 0"


OPERATOR = Operator("channel_norm", reference, fake, *without_gradient("channel_norm"), samples, bad_samples)
