"""``fxprune::tile_conv``: a convolution whose weight is cut in tiles of output channels, each with its own K rows.

    y[b, n] = act(sum over kept k = (c, r, s) of w[n, k] * x[b, c, oy*sh + r*dh - ph, ox*sw + s*dw - pw]
                  + bias[n] + residual[b, n])

The weight (N, C/groups, KH, KW) is packed as the matrix (N, K), K = C/groups * KH * KW, in the tiles of tile-wise
sparsity (SC'20), as for ``tile_gemm``. With groups, a tile lies inside one group and its index counts that group's K.
An implicit GEMM: the (K, pixels) matrix is never built.

Activations and values are float32, or bfloat16 with sums in float32 and one rounding at the end, as ``tile_gemm`` takes
them: the bias may then be either, the values may be an image.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxprune.ops import activation as act
from fxprune.ops import tile_conv_gradients as gradients
from fxprune.ops import tile_gradients, tile_image, tile_pack
from fxprune.ops.operator import Args, Operator, widened

aten = torch.ops.aten


def reference(
    x: Tensor,
    values: Tensor,
    index: Tensor,
    tile_ptr: Tensor,
    columns: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    granularity: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str = "none",
) -> Tensor:
    """Unpack and convolve densely. x: (B, C, H, W) -> (B, N, OH, OW) contiguous."""
    channels, dtype = x.shape[1] // groups, x.dtype
    k = channels * kernel_size[0] * kernel_size[1]
    if values.dim() == 2:
        values = tile_image.from_image(values, tile_ptr, columns, granularity)
    weight = tile_pack.unpack_reference(values, index, tile_ptr, columns, granularity, out_features, k)
    x, weight, bias, residual = widened(x, weight, bias, residual)
    window = weight.reshape(out_features, channels, *kernel_size)
    y = aten.conv2d.default(x.contiguous(), window, bias, stride, padding, dilation, groups)
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
    out_features: int,
    granularity: int,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str = "none",
) -> Tensor:
    size = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    return x.new_empty((x.shape[0], out_features, *size))


def setup_context(ctx: Any, inputs: Args, output: Tensor) -> None:
    *tensors, ctx.out_features, ctx.granularity, ctx.kernel_size, ctx.stride, ctx.padding, ctx.dilation = inputs[:-2]
    ctx.groups, ctx.activation = inputs[-2:]
    ctx.save_for_backward(*tensors)


def backward(ctx: Any, grad: Tensor) -> Args:
    x, values, index, tile_ptr, columns, bias, residual = ctx.saved_tensors
    need = ctx.needs_input_grad
    if values.dim() == 2:
        raise RuntimeError("fxprune::tile_conv has no gradient on an image of its values. Give the packed values.")
    window = (ctx.kernel_size, ctx.stride, ctx.padding, ctx.dilation, ctx.groups)
    structure = (index, tile_ptr, columns, ctx.granularity)
    if ctx.activation != "none":
        shape = (ctx.out_features, ctx.granularity, *window)
        # both in float32: a rounded sum may lie beyond a kink
        wide, weights, b, r, grad = widened(x, values, bias, residual, grad)
        pre = torch.ops.fxprune.tile_conv(wide, weights, index, tile_ptr, columns, b, r, *shape, "none")
        grad = act.BACKWARD[ctx.activation](grad, pre)
    k = x.shape[1] // ctx.groups * ctx.kernel_size[0] * ctx.kernel_size[1]
    input_of, weight_of = gradients.dense_input, gradients.dense_weight
    if tile_gradients.pays(values, columns, ctx.granularity, ctx.out_features * k):
        input_of, weight_of = torch.ops.fxprune.tile_conv_grad_input, torch.ops.fxprune.tile_conv_grad_weight
    narrow = grad.to(x.dtype)  # as the products read it
    grad_x = input_of(narrow, values, *structure, x.shape[1], list(x.shape[2:]), *window) if need[0] else None
    grad_values = weight_of(narrow, x, *structure, values.shape[0], *window) if need[1] else None
    grad_bias = grad.sum((0, 2, 3), dtype=bias.dtype) if bias is not None and need[5] else None
    grad_residual = grad.to(x.dtype) if residual is not None and need[6] else None
    return grad_x, grad_values, None, None, None, grad_bias, grad_residual, *[None] * 8


def _sample(
    x_shape: tuple[int, int, int, int],
    n: int,
    g: int,
    kernel: tuple[int, int],
    window: tuple[int, int, int],
    groups: int,
    name: str,
    extras: str = "",
) -> Args:
    gen = torch.Generator().manual_seed(sum(x_shape) * 13 + n * 5 + g)
    stride, padding, dilation = ([size, size] for size in window)
    k = x_shape[1] // groups * kernel[0] * kernel[1]
    packed = tile_pack.random_structure(n, k, g, gen, groups)
    x = torch.randn(*x_shape, generator=gen)
    size = [(x_shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in range(2)]
    bias = torch.randn(n, generator=gen) if "b" in extras else None
    residual = torch.randn(x_shape[0], n, *size, generator=gen) if "r" in extras else None
    return x, *packed, bias, residual, n, g, list(kernel), stride, padding, dilation, groups, name


def samples() -> Iterator[Args]:
    yield _sample((1, 5, 7, 7), 9, 4, (3, 3), (1, 1, 1), 1, "none", "b")
    yield _sample((2, 3, 9, 11), 10, 8, (3, 3), (2, 1, 1), 1, "relu6", "br")
    yield _sample((1, 4, 12, 13), 6, 8, (1, 5), (1, 2, 1), 1, "silu")
    yield _sample((2, 8, 6, 10), 8, 2, (3, 3), (1, 1, 2), 2, "none", "br")
    yield _sample((1, 3, 10, 9), 6, 2, (3, 2), (3, 1, 1), 3, "gelu", "b")
    yield _sample((1, 2, 7, 20), 5, 8, (7, 7), (1, 3, 1), 1, "hardswish", "b")
    x, values, *lists, bias, residual = _sample((2, 3, 9, 11), 40, 32, (3, 3), (2, 1, 1), 1, "relu6", "br")[:7]
    shape = (40, 32, [3, 3], [2, 2], [1, 1], [1, 1], 1, "relu6")
    half = (x.bfloat16(), values.bfloat16(), *lists, bias, residual.bfloat16())
    yield *half, *shape


def bad_samples() -> Iterator[tuple[Args, str]]:
    good = list(_sample((1, 5, 7, 7), 9, 4, (3, 3), (1, 1, 1), 1, "none", "b"))

    def broken(position: int, value: Any) -> Args:
        return tuple(value if i == position else a for i, a in enumerate(good))

    yield broken(0, good[0][0]), r"x"
    yield broken(0, good[0].double()), r"float32"
    yield broken(0, good[0][..., :1, :1, :0]), r"x"
    yield broken(1, good[1][:-1]), r"values"
    yield broken(2, good[2] + 100), r"index"
    yield broken(3, good[3] + 1), r"tile_ptr"
    yield broken(4, good[4] + 100), r"columns"
    yield broken(5, good[5][:3]), r"bias"
    yield broken(6, good[0]), r"residual"
    yield broken(8, 0), r"granularity"
    yield broken(9, [3]), r"kernel_size"
    yield broken(10, [0, 1]), r"stride"
    yield broken(13, 2), r"groups"
    yield broken(14, "swish"), r"activation"


OPERATOR = Operator("tile_conv", reference, fake, setup_context, backward, samples, bad_samples)
