"""Say our operators in standard ones, for runtimes that do not have them: ONNX, TensorRT, other consumers of programs.

    tile_gemm(x, packed)       =>  cat of linear(index_select(x, rows of a tile), small weight), or one linear with zeros
    tile_conv, depthwise_taps  =>  conv2d over the input channels that are read, with zeros for what is pruned of them

Done where the packed tensors are constants, which they are in every export, so the lists of kept rows become constants, too.
Where they are not, :func:`fxprune.decompositions` says the same by index arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ..graph import argument, fake
from ..ops import activation as act
from ..ops import depthwise_taps, tile_image, tile_pack
from ..ops.operator import widened

# Products a gathered element costs, by what is gathered: whole tiles pay where a tile has more output features than this.
_GATHER = 24
# Fewer products than this share must be left for channels to be gathered in front of a convolution.
_CHANNELS = 0.9


def decompose(gm: GraphModule) -> int:
    """Replace our operators whose packed tensors are attributes by submodules of standard ones; returns how many."""
    changed = 0
    for node in list(gm.graph.nodes):
        build = _PARTS.get(node.target) if node.op == "call_function" else None
        if build is None:
            continue
        packed = [_constant(gm, argument(node, name)) for name in build[0]]
        if any(value is None for value in packed):
            continue
        name = f"standard_{node.name}"
        part = build[1](node, *[value.cpu() for value in packed if value is not None])
        gm.add_submodule(name, part.to(packed[0].device))  # type: ignore[union-attr]
        with gm.graph.inserting_before(node):
            new = gm.graph.call_module(name, tuple(argument(node, name) for name in build[2]))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        gm.graph.erase_node(node)
        changed += 1
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return changed


def _constant(gm: GraphModule, node: Any) -> Tensor | None:
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value: Any = gm
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value.detach()  # type: ignore[no-any-return]


class _Finish(nn.Module):
    """Put back output features that nothing is kept of, then bias, residual and activation, along dimension ``dim``."""

    place: Tensor | None

    def __init__(self, columns: Tensor, features: int, dim: int, activation: str) -> None:
        super().__init__()
        self.dim, self.activation = dim, activation
        self.whole = len(columns) == features
        place = torch.full((features,), len(columns))  # the zeros behind what is kept
        place[columns.long()] = torch.arange(len(columns))
        self.register_buffer("place", None if self.whole else place)

    def forward(self, y: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        if self.place is not None:
            y = torch.cat([y, torch.zeros_like(y.narrow(self.dim, 0, 1))], self.dim).index_select(self.dim, self.place)
        if bias is not None:
            y = y + bias.reshape([-1, *[1] * (y.dim() - 2)] if self.dim == 1 else [-1])
        y = y if residual is None else y + residual
        return act.FORWARD[self.activation](y)


class Gemm(nn.Module):
    """``tile_gemm`` with constant weights. ``parts``: (kept rows or ``None`` for all, weight (g, k)) of runs of tiles."""

    def __init__(self, weight: Tensor, columns: Tensor, tiles: list[Tensor], width: int, dim: int, activation: str) -> None:
        super().__init__()
        self.dim = dim
        kept = weight[columns.long()]
        runs = _runs(tiles, width, len(columns), weight.shape[1])
        self.number = len(runs)
        for i, (rows, first, last) in enumerate(runs):
            self.register_buffer(f"rows{i}", rows)
            part = kept[first:last] if rows is None else kept[first:last][:, rows]
            self.register_buffer(f"weight{i}", part.contiguous())
        self.finish = _Finish(columns, len(weight), dim, activation)

    def forward(self, x: Tensor, bias: Tensor | None, residual: Tensor | None, gate: Tensor | None) -> Tensor:
        if gate is not None:
            x = x * gate.reshape([*gate.shape, *[1] * (x.dim() - 2)])
        dtype = x.dtype
        x, bias, residual = widened(x, bias, residual)
        return _rounded(self._rows(x, bias, residual), dtype)

    def _rows(self, x: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        if self.number == 1 and self.finish.whole:  # a runtime fuses the bias it finds here
            rows, weight = self._run(0)
            x = x if rows is None else x.index_select(self.dim, rows)
            return self.finish(self._product(x, weight, bias), None, residual)  # type: ignore[no-any-return]
        flip = self.dim == -1 and x.dim() > 1  # rows that follow each other in memory are cheap to gather
        x, dim = (x.transpose(-1, -2), -2) if flip else (x, self.dim)
        parts = []
        for i in range(self.number):
            rows, weight = self._run(i)
            read = x if rows is None else x.index_select(dim, rows)
            parts.append(torch.matmul(weight, read) if flip else self._product(read, weight))
        y = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        return self.finish(y.transpose(-1, -2) if flip else y, bias, residual)  # type: ignore[no-any-return]

    def _run(self, i: int) -> tuple[Tensor | None, Tensor]:
        return getattr(self, f"rows{i}"), getattr(self, f"weight{i}")

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.dim == -1:
            return F.linear(x, weight, bias)
        if x.dim() == 4:
            return F.conv2d(x, weight[:, :, None, None], bias)
        flat = F.conv1d(x.flatten(2), weight[:, :, None], bias)
        return flat.reshape([flat.shape[0], flat.shape[1], *x.shape[2:]])


def _rounded(y: Tensor, dtype: torch.dtype) -> Tensor:
    """``y.to(dtype)`` without a node, and an assertion beside it, where there is nothing to do."""
    return y if y.dtype == dtype else y.to(dtype)


def _runs(tiles: list[Tensor], width: int, columns: int, k: int) -> list[tuple[Tensor | None, int, int]]:
    """Return (rows, first column, last column) of tiles next to each other that keep the same rows; one run with zeros
    where gathering would cost more than it saves."""
    runs: list[tuple[Tensor, int, int]] = []
    for t, rows in enumerate(tiles):
        first, last = t * width, min((t + 1) * width, columns)
        before = runs[-1] if runs else None
        if before is not None and torch.equal(before[0], rows):
            runs[-1] = (before[0], before[1], last)
        else:
            runs.append((rows, first, last))
    cost = sum(
        len(rows) * (last - first + (_GATHER if len(rows) < k else 0)) for rows, first, last in runs if rows is not None
    )
    if cost >= columns * k or not runs:
        return [(None, 0, columns)]
    return [(None if len(rows) == k else rows, first, last) for rows, first, last in runs if rows is not None]


class Conv(nn.Module):
    """A convolution with constant weights: ``tile_conv`` and ``depthwise_taps``."""

    channels: Tensor | None
    weight: Tensor

    def __init__(
        self, weight: Tensor, columns: Tensor, windows: tuple[list[int], ...], groups: int, activation: str
    ) -> None:
        super().__init__()
        (self.stride, self.padding, self.dilation), self.groups = windows, groups
        used = weight[columns.long()].ne(0).any(3).any(2).any(0).nonzero().flatten()
        shrinks = groups == 1 and 0 < len(used) < _CHANNELS * weight.shape[1]
        columns = columns if groups == 1 else torch.arange(len(weight))
        kept = weight[columns.long()]
        self.register_buffer("channels", used if shrinks else None)
        self.register_buffer("weight", (kept[:, used] if shrinks else kept).contiguous())
        self.finish = _Finish(columns, len(weight), 1, activation)

    def forward(self, x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        dtype = x.dtype
        x, bias, residual = widened(x if self.channels is None else x.index_select(1, self.channels), bias, residual)
        inside = bias if self.finish.whole else None
        y = F.conv2d(x, self.weight, inside, self.stride, self.padding, self.dilation, self.groups)
        return _rounded(self.finish(y, None if self.finish.whole else bias, residual), dtype)


def _channels(node: Node, dim: int) -> int:
    x = fake(node.args[0])
    assert x is not None, node
    return int(x.shape[dim])


def _matrix(values: Tensor, index: Tensor, tile_ptr: Tensor, columns: Tensor, g: int, n: int, k: int) -> Tensor:
    """Return the dense weight (n, k), in float32 also from bfloat16 values or an image of them."""
    if values.dim() == 2:
        values = tile_image.from_image(values, tile_ptr, columns, g)
    (values,) = widened(values)
    return tile_pack.unpack_reference(values, index, tile_ptr, columns, g, n, k)


def _gemm(node: Node, values: Tensor, index: Tensor, tile_ptr: Tensor, columns: Tensor) -> nn.Module:
    n, g, dim, activation = (argument(node, name) for name in ("out_features", "granularity", "feature_dim", "activation"))
    weight = _matrix(values, index, tile_ptr, columns, g, n, _channels(node, dim))
    ends = tile_ptr.tolist()
    tiles = [index[a:b].long() for a, b in pairwise(ends)]
    return Gemm(weight, columns, tiles, g, dim, activation)


def _conv(node: Node, values: Tensor, index: Tensor, tile_ptr: Tensor, columns: Tensor) -> nn.Module:
    n, g, groups, kernel = (argument(node, name) for name in ("out_features", "granularity", "groups", "kernel_size"))
    channels = _channels(node, 1) // groups
    flat = _matrix(values, index, tile_ptr, columns, g, n, channels * kernel[0] * kernel[1])
    return Conv(flat.reshape(n, channels, *kernel), columns, _windows(node), groups, argument(node, "activation"))


def _depthwise(node: Node, weight: Tensor, taps: Tensor) -> nn.Module:
    (weight,) = widened(weight)
    kept = depthwise_taps.window(weight, taps, argument(node, "kernel_size"))
    return Conv(kept, torch.arange(len(kept)), _windows(node), len(kept), argument(node, "activation"))


def _windows(node: Node) -> tuple[list[int], ...]:
    return tuple(argument(node, name) for name in ("stride", "padding", "dilation"))


# operator -> (its packed tensors, how to build its part, what stays an argument)
_TILES = ("values", "index", "tile_ptr", "columns")
_PARTS: dict[Any, tuple[tuple[str, ...], Callable[..., nn.Module], tuple[str, ...]]] = {
    torch.ops.fxprune.tile_gemm.default: (_TILES, _gemm, ("x", "bias", "residual", "gate")),
    torch.ops.fxprune.tile_conv.default: (_TILES, _conv, ("x", "bias", "residual")),
    torch.ops.fxprune.depthwise_taps.default: (("weight", "taps"), _depthwise, ("x", "bias")),
}
