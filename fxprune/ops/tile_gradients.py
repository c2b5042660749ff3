"""``fxprune::tile_grad_input`` and ``tile_grad_weight``: the gradients of ``tile_gemm`` over its kept weights.

    dx[k] = sum over kept n of w[n, k] * grad[n]
    dw[n, k] = sum over rows (tokens) of grad[n] * x[k], for kept (n, k) alone, in the packed layout

Layouts as of ``tile_gemm``: ``feature_dim=1``, (B, N, *spatial), or ``feature_dim=-1``, (..., N). Compiled for GPUs;
elsewhere their references run. Together with ``tile_gemm`` they are closed under differentiation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fxprune.ops import tile_pack
from fxprune.ops.operator import Args, Operator, widened

OPS = torch.ops.fxprune
# What a GPU runs sparse: tiles that fill its matrix instructions, and few enough kept weights that mma.sync over them beats
# a dense product at full rate. Not measured: docs/cuda.md.
LEAST_FEATURES, MOST_KEPT = 16, 0.5


def pays(values: Tensor, columns: Tensor, granularity: int, dense: int) -> bool:
    """Whether gradients over kept weights alone are expected to be faster than PyTorch's; dense: weights of the layer."""
    features = min(granularity, columns.shape[0])
    return values.is_cuda and features >= LEAST_FEATURES and values.shape[0] <= MOST_KEPT * dense


def dense_input(
    grad: Tensor,
    values: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    granularity: int,
    in_features: int,
    feature_dim: int,
    unpack: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The input's gradient by a dense product; ``unpack`` makes the weight (by default ``tile_unpack``)."""
    shape = (granularity, grad.shape[feature_dim], in_features)
    weight = (unpack or OPS.tile_unpack)(values, index, tile_ptr, columns, *shape)
    if feature_dim == -1:
        return torch.matmul(grad, weight)
    flat = grad.reshape(*grad.shape[:2], -1)
    return torch.matmul(weight.t(), flat).reshape(grad.shape[0], in_features, *grad.shape[2:])


def dense_weight(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    granularity: int,
    nnz: int,
    feature_dim: int,
    pack: Callable[..., Tensor] | None = None,
) -> Tensor:
    """The weight's gradient by a dense product, packed by ``pack`` (by default ``tile_pack``)."""
    if feature_dim == -1:
        dense = torch.matmul(grad.reshape(-1, grad.shape[-1]).t(), x.reshape(-1, x.shape[-1]))
    else:
        flat = x.reshape(*x.shape[:2], -1)
        dense = torch.matmul(grad.reshape(*grad.shape[:2], -1), flat.transpose(1, 2)).sum(0)
    return (pack or OPS.tile_pack)(dense, index, tile_ptr, columns, granularity, nnz)


def input_reference(
    grad: Tensor,
    values: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    granularity: int,
    in_features: int,
    feature_dim: int,
) -> Tensor:
    """grad: as the output of ``tile_gemm``; values: (nnz,); returns the shape of its input."""
    _check_layout(grad, feature_dim)
    g, w = widened(grad, values)
    structure = (index, tile_ptr, columns, granularity)
    dx = dense_input(g, w, *structure, in_features, feature_dim, unpack=tile_pack.unpack_reference)
    return dx.to(grad.dtype).contiguous()


def input_fake(
    grad: Tensor,
    values: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    granularity: int,
    in_features: int,
    feature_dim: int,
) -> Tensor:
    shape = list(grad.shape)
    shape[feature_dim] = in_features
    return grad.new_empty(shape)


def setup_context(ctx: Any, inputs: Args, output: Tensor) -> None:
    *tensors, ctx.granularity, _, ctx.feature_dim = inputs
    ctx.save_for_backward(*tensors)


def input_backward(ctx: Any, g: Tensor) -> Args:
    grad, values, *structure = ctx.saved_tensors
    structure.append(ctx.granularity)
    first = second = None
    if ctx.needs_input_grad[0]:
        first = _forward(g, values, structure, grad.shape[ctx.feature_dim], ctx.feature_dim)
    if ctx.needs_input_grad[1]:
        second = OPS.tile_grad_weight(grad, g, *structure, values.shape[0], ctx.feature_dim)
    return first, second, *[None] * 6


def weight_reference(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    granularity: int,
    nnz: int,
    feature_dim: int,
) -> Tensor:
    """grad: as the output of ``tile_gemm``; x: as its input; returns the packed (nnz,)."""
    _check_layout(grad, feature_dim)
    if x.dim() != grad.dim():
        raise RuntimeError(f"x must have the dimensions of grad {tuple(grad.shape)}, got {tuple(x.shape)}")
    g, wide = widened(grad, x)
    structure = (index, tile_ptr, columns, granularity)
    return dense_weight(g, wide, *structure, nnz, feature_dim, pack=tile_pack.pack_reference).to(grad.dtype)


def weight_fake(
    grad: Tensor,
    x: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    granularity: int,
    nnz: int,
    feature_dim: int,
) -> Tensor:
    return grad.new_empty((nnz,))


def weight_backward(ctx: Any, g: Tensor) -> Args:
    grad, x, *structure = ctx.saved_tensors
    structure.append(ctx.granularity)
    first = second = None
    if ctx.needs_input_grad[0]:
        first = _forward(x, g, structure, grad.shape[ctx.feature_dim], ctx.feature_dim)
    if ctx.needs_input_grad[1]:
        second = OPS.tile_grad_input(grad, g, *structure, x.shape[ctx.feature_dim], ctx.feature_dim)
    return first, second, *[None] * 6


def _forward(x: Tensor, values: Tensor, structure: list[Any], out_features: int, feature_dim: int) -> Tensor:
    *lists, granularity = structure
    y: Tensor = OPS.tile_gemm(x, values, *lists, None, None, None, out_features, granularity, feature_dim, "none")
    return y


def _check_layout(grad: Tensor, feature_dim: int) -> None:
    if feature_dim not in (1, -1):
        raise RuntimeError(f"feature_dim must be 1 or -1, got {feature_dim}")
    if grad.dim() < (3 if feature_dim == 1 else 1):
        expected = "(B, N, *spatial) with at least one spatial dimension" if feature_dim == 1 else "(*, N)"
        raise RuntimeError(f"grad must have shape {expected}, got {tuple(grad.shape)}")


def _cases() -> Iterator[tuple[Args, Args]]:
    """Yield arguments of both operators."""
    for lead, k, n, spatial, g, feature_dim in (
        ((2,), 9, 10, (7, 3), 4, 1), ((1,), 40, 70, (8,), 64, 1), ((2, 3), 10, 9, (), 4, -1), ((), 7, 6, (), 64, -1),
    ):  # fmt: skip
        gen = torch.Generator().manual_seed(n)
        values, *structure = tile_pack.random_structure(n, k, g, gen)
        grad, x = (torch.randn(*lead, features, *spatial, generator=gen) for features in (n, k))
        yield (grad, values, *structure, g, k, feature_dim), (grad, x, *structure, g, len(values), feature_dim)


def input_samples() -> Iterator[Args]:
    yield from (case[0] for case in _cases())


def weight_samples() -> Iterator[Args]:
    yield from (case[1] for case in _cases())


def input_bad_samples() -> Iterator[tuple[Args, str]]:
    grad, values, *rest = next(input_samples())
    yield (grad[0, 0], values, *rest), r"grad must have shape"
    yield (grad, values, *rest[:-1], 2), r"feature_dim"


def weight_bad_samples() -> Iterator[tuple[Args, str]]:
    grad, x, *rest = next(weight_samples())
    yield (grad, x[0], *rest), r"x must have"
    yield (grad, x, *rest[:-1], 2), r"feature_dim"


INPUT = Operator(
    "tile_grad_input", input_reference, input_fake, setup_context, input_backward, input_samples, input_bad_samples
)
WEIGHT = Operator(
    "tile_grad_weight", weight_reference, weight_fake, setup_context, weight_backward, weight_samples, weight_bad_samples
)
