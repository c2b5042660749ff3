"""``fxprune::tile_gemm``: a GEMM whose weight is cut in tiles of output features, each with its own K rows.

    out[n] = act(sum over kept k of w[n, k] * gate[k] * x[k] + bias[n] + residual[n])

``feature_dim=1`` is feature-major, x: (B, K, *spatial) -> (B, N, *spatial); ``feature_dim=-1`` is row-major,
x: (..., K) -> (..., N). Output features outside ``columns`` hold act(bias + residual). The packed weight
(values, index, tile_ptr, columns) is tile-wise sparsity's (SC'20): dense blocks addressed through kept-index lists.

Activations and values are float32, or bfloat16 with sums in float32 and one rounding at the end; the bias may then be
either. bfloat16 values may also be given as an image, see :mod:`fxprune.ops.tile_image`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxprune.ops import activation as act
from fxprune.ops import tile_gradients, tile_image, tile_pack
from fxprune.ops.operator import Args, Operator, widened


def reference(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    out_features: int,
    granularity: int,
    feature_dim: int,
    activation: str = "none",
) -> Tensor:
    """Unpack and multiply densely; returns a contiguous tensor."""
    k, dtype = x.shape[feature_dim], x.dtype
    if values.dim() == 2:
        values = tile_image.from_image(values, tile_ptr, columns, granularity)
    weight = tile_pack.unpack_reference(values, index, tile_ptr, columns, granularity, out_features, k)
    if gate is not None:
        x = x * gate.reshape(*gate.shape, *[1] * (x.dim() - 2))
    x, weight, bias, residual = widened(x, weight, bias, residual)
    if feature_dim == 1:
        flat = x.reshape(x.shape[0], k, -1)
        y = torch.matmul(weight, flat).reshape(x.shape[0], out_features, *x.shape[2:])
        if bias is not None:
            y = y + bias.reshape(-1, *[1] * (x.dim() - 2))
    else:
        y = torch.matmul(x, weight.t())
        if bias is not None:
            y = y + bias
    if residual is not None:
        y = y + residual
    return act.FORWARD[activation](y).to(dtype).contiguous()


def fake(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    out_features: int,
    granularity: int,
    feature_dim: int,
    activation: str = "none",
) -> Tensor:
    if feature_dim == 1:
        return x.new_empty((x.shape[0], out_features, *x.shape[2:]))
    return x.new_empty((*x.shape[:-1], out_features))


def setup_context(ctx: Any, inputs: Args, output: Tensor) -> None:
    *tensors, ctx.out_features, ctx.granularity, ctx.feature_dim, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def backward(ctx: Any, grad: Tensor) -> Args:
    x, values, index, tile_ptr, columns, bias, residual, gate = ctx.saved_tensors
    need, axis = ctx.needs_input_grad, ctx.feature_dim
    if values.dim() == 2:
        raise RuntimeError("fxprune::tile_gemm has no gradient on an image of its values. Give the packed values.")
    if ctx.activation != "none":
        grad = _before_activation(ctx, grad)
    k = x.shape[axis]
    input_of, weight_of = tile_gradients.dense_input, tile_gradients.dense_weight
    narrow = grad  # as the products read it
    if tile_gradients.pays(values, columns, ctx.granularity, ctx.out_features * k):
        input_of, weight_of = torch.ops.fxprune.tile_grad_input, torch.ops.fxprune.tile_grad_weight
        narrow = grad.to(x.dtype)
    elif ctx.activation != "none":
        x, values, gate = widened(x, values, gate)
    structure = (index, tile_ptr, columns, ctx.granularity)
    scale = None if gate is None else gate.reshape(*gate.shape, *[1] * (x.dim() - 2))
    grad_x = grad_gate = grad_values = grad_bias = None
    if need[0] or need[7]:
        back = input_of(narrow, values, *structure, k, axis)
        grad_x = (back if scale is None else back * scale) if need[0] else None
        grad_gate = (back * x).flatten(2).sum(-1) if need[7] else None
    if need[1]:
        grad_values = weight_of(narrow, x if scale is None else x * scale, *structure, values.shape[0], axis)
    if bias is not None and need[5]:
        others = (0, *range(2, grad.dim())) if axis == 1 else tuple(range(grad.dim() - 1))
        grad_bias = grad.sum(others, dtype=bias.dtype) if others else grad
    grad_residual = grad if residual is not None and need[6] else None
    gradients = (grad_x, grad_values, None, None, None, grad_bias, grad_residual, grad_gate)
    pairs = zip(gradients, ctx.saved_tensors, strict=True)
    return *(g if g is None else g.to(t.dtype) for g, t in pairs), None, None, None, None


def _before_activation(ctx: Any, grad: Tensor) -> Tensor:
    """Return the gradient of the sum in front of the activation, both in float32: a rounded sum may lie beyond a kink."""
    x, values, index, tile_ptr, columns, bias, residual, gate = ctx.saved_tensors
    if gate is not None and x.dtype == torch.bfloat16:  # the kernel rounds the product
        x, gate = x * gate.reshape(*gate.shape, *[1] * (x.dim() - 2)), None
    x, values, bias, residual, grad = widened(x, values, bias, residual, grad)
    operands = (
        x,
        values,
        index,
        tile_ptr,
        columns,
        bias,
        residual,
        gate,
        ctx.out_features,
        ctx.granularity,
        ctx.feature_dim,
    )
    return act.BACKWARD[ctx.activation](grad, torch.ops.fxprune.tile_gemm(*operands, "none"))


def _sample(x_shape: tuple[int, ...], n: int, g: int, feature_dim: int, name: str, extras: str = "") -> Args:
    gen = torch.Generator().manual_seed(sum(x_shape) * 13 + n * 5 + g)
    k = x_shape[feature_dim]
    values, index, tile_ptr, columns = tile_pack.random_structure(n, k, g, gen)
    x = torch.randn(*x_shape, generator=gen)
    out = (x_shape[0], n, *x_shape[2:]) if feature_dim == 1 else (*x_shape[:-1], n)
    bias = torch.randn(n, generator=gen) if "b" in extras else None
    residual = torch.randn(*out, generator=gen) if "r" in extras else None
    gate = torch.rand(x_shape[0], k, generator=gen) if "g" in extras else None
    return x, values, index, tile_ptr, columns, bias, residual, gate, n, g, feature_dim, name


def _half(args: Args) -> Args:
    """The sample in bfloat16, its bias as it is."""
    return tuple(
        a.bfloat16() if isinstance(a, Tensor) and a.is_floating_point() and i != 5 else a for i, a in enumerate(args)
    )


def samples() -> Iterator[Args]:
    yield _sample((1, 6, 5, 5), 8, 4, 1, "none", "b")
    yield _sample((2, 9, 7, 3), 10, 4, 1, "relu6", "br")
    yield _sample((2, 5, 4, 4), 7, 8, 1, "silu", "bg")
    yield _sample((3, 8, 17), 5, 2, 1, "none", "brg")
    yield _sample((1, 12), 20, 16, -1, "none", "b")
    yield _sample((2, 3, 10), 9, 4, -1, "gelu", "br")
    yield _sample((7,), 6, 64, -1, "gelu_tanh")
    yield _half(_sample((2, 6, 5, 3), 18, 16, 1, "relu6", "brg"))
    yield _half(_sample((3, 12), 20, 16, -1, "silu", "b"))


def bad_samples() -> Iterator[tuple[Args, str]]:
    good = list(_sample((1, 6, 5, 5), 8, 4, 1, "none", "b"))

    def broken(position: int, value: Any) -> Args:
        return tuple(value if i == position else a for i, a in enumerate(good))

    yield broken(0, good[0].double()), r"float32"
    yield broken(1, good[1][:-1]), r"values"
    yield broken(2, good[2] + 100), r"index"
    yield broken(2, good[2].long()), r"index"
    yield broken(3, good[3] + 1), r"tile_ptr"
    yield broken(4, good[4] + 100), r"columns"
    yield broken(5, good[5][:3]), r"bias"
    yield broken(6, good[0][:, :2]), r"residual"
    yield broken(7, good[0][:, :2, 0, 0]), r"gate"
    yield broken(9, 0), r"granularity"
    yield broken(10, 2), r"feature_dim"
    yield broken(11, "swish"), r"activation"


OPERATOR = Operator("tile_gemm", reference, fake, setup_context, backward, samples, bad_samples)
