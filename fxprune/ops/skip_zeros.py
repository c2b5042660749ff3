"""``fxprune::skip_zeros_mm``: a matrix product that skips the zeros of its left operand.

    out = x @ weight        x: (*, N) for dim=-1, (B, N, *positions) for dim=1; weight: (N, K)

The data gradient of a linear layer or a 1x1 convolution, with x a pruned dL/dO (``nm_prune``) and the weight as it lies.
Any zero is skipped, wherever it is; the reference multiplies it, which differs where the weight holds Inf or NaN. The
result has the memory format of ``x``, or is contiguous.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxprune.ops.nm_prune import strides
from fxprune.ops.operator import Args, Operator


def reference(x: Tensor, weight: Tensor, dim: int) -> Tensor:
    return _like((x.movedim(dim, -1) @ weight).movedim(-1, dim), x, dim)


def fake(x: Tensor, weight: Tensor, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = weight.shape[1]
    return _like(x.new_empty(shape), x, dim)


def setup_context(ctx: Any, inputs: Args, output: Tensor) -> None:
    x, weight, ctx.dim = inputs
    ctx.save_for_backward(x, weight)


def backward(ctx: Any, grad: Tensor) -> Args:
    x, weight = ctx.saved_tensors
    rows = grad.movedim(ctx.dim, -1)
    d_x = (rows @ weight.t()).movedim(-1, ctx.dim) if ctx.needs_input_grad[0] else None
    d_weight = None
    if ctx.needs_input_grad[1]:
        d_weight = x.movedim(ctx.dim, -1).reshape(-1, weight.shape[0]).t() @ rows.reshape(-1, weight.shape[1])
    return d_x, d_weight, None


def _like(y: Tensor, x: Tensor, dim: int) -> Tensor:
    """Return ``y`` in the memory format of ``x``."""
    if dim == 1 and x.dim() > 2 and not x.is_contiguous() and strides(x, dim) == x.stride():
        return y.movedim(1, -1).contiguous().movedim(-1, 1)
    return y.contiguous()


def _sample(shape: tuple[int, ...], k: int, dim: int, last: bool = False) -> Args:
    gen = torch.Generator().manual_seed(sum(shape) * 31 + k)
    x = torch.randn(*shape, generator=gen)
    x = torch.where(torch.rand(*shape, generator=gen) < 0.5, x, 0)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.randn(shape[dim], k, generator=gen), dim


def samples() -> Iterator[Args]:
    yield _sample((5, 24), 17, -1)
    yield _sample((2, 3, 40), 150, -1)
    yield _sample((7,), 5, -1)
    yield _sample((2, 9, 3, 5), 6, 1)
    yield _sample((1, 140, 17), 33, 1)
    yield _sample((2, 20, 3, 4), 18, 1, last=True)
    yield _sample((4, 12), 7, 1)


def bad_samples() -> Iterator[tuple[Args, str]]:
    x, weight, dim = _sample((2, 9, 3, 5), 6, 1)
    yield (x.double(), weight, dim), r"x must be float32"
    yield (x, weight.double(), dim), r"weight must be float32"
    yield (x, weight, 2), r"dim must be 1 or -1, got 2"
    yield (x[0, :, 0, 0], weight, 1), r"x must have two dimensions or more, got shape \(9\)"
    yield (x, weight[0], 1), r"weight must have shape \(N, K\), got \(6\)"
    yield (x, weight, -1), r"weight must have shape \(5, 6\), got \(9, 6\)"


OPERATOR = Operator("skip_zeros_mm", reference, fake, setup_context, backward, samples, bad_samples)
