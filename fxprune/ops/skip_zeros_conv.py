"""``fxprune::skip_zeros_conv``: the data gradient of a convolution with stride 1, which skips the zeros of dL/dO.

    out = conv_transpose2d(x, weight, padding=padding)        x: (B, N, H, W), weight: (N, K, R, S)

x is a pruned dL/dO (``nm_prune``), the weight that of the convolution as it lies; channels-last weights are not copied.
Padding is smaller than the window. Any zero is skipped; the reference multiplies it, which differs where the weight holds
Inf or NaN. The result has the memory format of ``x``, or is contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxprune.ops.nm_prune import strides
from fxprune.ops.operator import Args, Operator


def reference(x: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
    return _like(F.conv_transpose2d(x, weight, padding=list(padding)), x)


def fake(x: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
    sizes = [x.shape[i] + weight.shape[i] - 1 - 2 * padding[i - 2] for i in (2, 3)]
    return _like(x.new_empty([x.shape[0], weight.shape[1], *sizes]), x)


def setup_context(ctx: Any, inputs: Args, output: Tensor) -> None:
    x, weight, ctx.padding = inputs
    ctx.save_for_backward(x, weight)


def backward(ctx: Any, grad: Tensor) -> Args:
    x, weight = ctx.saved_tensors
    wanted = [*ctx.needs_input_grad[:2], False]
    rest = ([1, 1], list(ctx.padding), [1, 1], True, [0, 0], 1, wanted)
    d_x, d_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *rest)
    return d_x, d_weight, None


def _like(y: Tensor, x: Tensor) -> Tensor:
    """Return ``y`` in the memory format of ``x``."""
    last = not x.is_contiguous() and strides(x, 1) == x.stride()
    return y.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def _sample(shape: tuple[int, ...], k: int, window: tuple[int, int], padding: tuple[int, int], last: bool = False) -> Args:
    gen = torch.Generator().manual_seed(sum(shape) * 31 + k)
    x = torch.randn(*shape, generator=gen)
    x = torch.where(torch.rand(*shape, generator=gen) < 0.5, x, 0)
    weight = torch.randn(shape[1], k, *window, generator=gen)
    if last:
        x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return x, weight, list(padding)


def samples() -> Iterator[Args]:
    yield _sample((2, 9, 4, 5), 6, (3, 3), (1, 1))
    yield _sample((1, 140, 5, 3), 17, (3, 3), (1, 1))
    yield _sample((2, 20, 5, 4), 18, (3, 3), (1, 1), last=True)
    yield _sample((2, 8, 3, 4), 5, (5, 2), (2, 0))
    yield _sample((3, 8, 1, 4), 5, (1, 3), (0, 2), last=True)
    yield _sample((1, 4, 2, 2), 3, (1, 1), (0, 0))


def bad_samples() -> Iterator[tuple[Args, str]]:
    x, weight, padding = _sample((2, 9, 4, 5), 6, (3, 3), (1, 1))
    yield (x.double(), weight, padding), r"x must be float32"
    yield (x, weight.double(), padding), r"weight must be float32"
    yield (x[0], weight, padding), r"x must have shape \(B, N, H, W\), got \(9, 4, 5\)"
    yield (x, weight[:5], padding), r"weight must have shape \(9, K, R, S\), got \(5, 6, 3, 3\)"
    yield (x, weight[0], padding), r"weight must have shape \(9, K, R, S\), got \(6, 3, 3\)"
    yield (x, weight, [1]), r"padding must be two numbers from 0 on and smaller than the window 3x3"
    yield (x, weight, [1, 3]), r"padding must be two numbers from 0 on and smaller than the window 3x3"
    yield (x, weight, [-1, 1]), r"padding must be two numbers from 0 on and smaller than the window 3x3"
    yield (x[:, :, :1], weight, [2, 1]), r"x of 1x5 is smaller than the padding takes away"


OPERATOR = Operator("skip_zeros_conv", reference, fake, setup_context, backward, samples, bad_samples)
