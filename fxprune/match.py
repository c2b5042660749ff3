"""What detection finds: one :class:`Match` per convolution or linear layer, one :class:`Block` per DSConv."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.ops import cuda_tf32_image
from fxprune.sparsity.tile_plan import width_in_groups


@dataclass(frozen=True)
class Geometry:
    """Shapes of one call. ``x`` and ``y`` may hold SymInts; windows are (height, width).

    A one-dimensional convolution is described as an image of height 1.
    """

    x: tuple[Any, ...]
    y: tuple[Any, ...]
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def windows(self) -> list[list[int]]:
        """Kernel size, stride, padding and dilation as the operators take them."""
        return [list(self.kernel), list(self.stride), list(self.padding), list(self.dilation)]

    def __str__(self) -> str:
        text = "x".join(str(s) for s in self.x) + "->" + "x".join(str(s) for s in self.y[1:])
        if self.kernel != (1, 1):
            text += f" k{self.kernel[0]}" + ("" if self.kernel[0] == self.kernel[1] else f"x{self.kernel[1]}")
        if self.stride != (1, 1):
            text += f" s{self.stride[0]}" + ("" if self.stride[0] == self.stride[1] else f"x{self.stride[1]}")
        if self.groups != 1 and self.groups != self.x[1]:
            text += f" g{self.groups}"
        return text


@dataclass(frozen=True)
class Recurrent:
    """Which weight of an LSTM or GRU call: layer, direction (1 runs backwards), and position in its parameter list.

    hidden: ``weight_hh``, which multiplies the hidden state at every step; else ``weight_ih``, which multiplies the inputs.
    """

    layer: int
    direction: int
    position: int
    hidden: bool


@dataclass(frozen=True)
class WeightView:
    """How a weight of ``shape`` is seen as a matrix; it holds no tensor."""

    shape: torch.Size
    transposed: bool

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(C, KH*KW) of a depthwise weight, (N, K) of a GEMM weight, K = C/groups * KH * KW of a convolution's."""
        n, k = self.shape[0], self.shape.numel() // max(self.shape[0], 1)
        return (k, n) if self.transposed else (n, k)

    def matrix(self, weight: Tensor) -> Tensor:
        """View a tensor of the weight's shape as :attr:`matrix_shape`."""
        return weight.t() if self.transposed else weight.reshape(self.matrix_shape)

    def restore(self, matrix: Tensor) -> Tensor:
        """Inverse of :meth:`matrix`."""
        return matrix.t() if self.transposed else matrix.reshape(self.shape)


@dataclass(frozen=True, eq=False)
class Match:
    """One prunable call.

    kind: "depthwise", "pointwise" (1x1 convolution), "conv" (any other convolution), "linear" or "rnn" (one weight of an
        LSTM or GRU call).
    node: the ATen call; ``x`` and ``bias`` are read from its arguments ``operands`` (x, bias), because an earlier
        rewrite may have replaced them. weight: the placeholder or attribute behind the weight operand.
    name: the layer's qualified name ("blocks.1.0.conv_dw"); ``parameter``: the weight's.
    value: the real weight. ``transposed``: the operand is stored (K, N) instead of (N, K).
    recurrent: set for kind "rnn", whose matches share one node; ``name`` is then the weight's own.
    """

    kind: str
    node: Node
    operands: tuple[int, int | None]
    weight: Node
    name: str
    parameter: str
    value: Tensor
    geometry: Geometry
    transposed: bool = False
    recurrent: Recurrent | None = None

    @property
    def x(self) -> Node:
        """The activation operand."""
        return self.node.args[self.operands[0]]  # type: ignore[return-value]

    @property
    def bias(self) -> Node | None:
        """The bias operand, if any."""
        position = self.operands[1]
        given = position is not None and position < len(self.node.args)
        return self.node.args[position] if given else None  # type: ignore[return-value, index]

    @property
    def on_gpu(self) -> bool:
        """Whether the layer runs on a GPU. What is derived from its weight is built on the CPU all the same."""
        return self.value.is_cuda

    @property
    def tf32(self) -> bool:
        """Whether PyTorch may now multiply this layer's float32 weights in TF32, on a GPU."""
        convolution = self.kind in ("pointwise", "conv")
        return self.on_gpu and self.value.dtype == torch.float32 and cuda_tf32_image.allowed(convolution)

    @property
    def view(self) -> WeightView:
        """The weight as a matrix, for what outlives the compile."""
        return WeightView(self.value.shape, self.transposed)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.view.matrix_shape

    def tile_width(self, wanted: int) -> int:
        """Return ``wanted`` output features per tile, or fewer, so that with groups a tile lies inside one."""
        return width_in_groups(self.matrix_shape[0], self.geometry.groups, wanted)

    def matrix(self, weight: Tensor) -> Tensor:
        return self.view.matrix(weight)

    def restore(self, matrix: Tensor) -> Tensor:
        return self.view.restore(matrix)

    def shell(self) -> Match:
        """Return the match with only the shape and the type of its weight."""
        return replace(self, value=torch.empty(self.value.shape, dtype=self.value.dtype, device="meta"))

    def where(self) -> str:
        """The layer and the user's own source line."""
        lines = [s for s in (self.node.meta.get("stack_trace") or "").splitlines() if "File" in s]
        return f"{self.name}, {lines[-1].strip()}" if lines else self.name


@dataclass(frozen=True, eq=False)
class Block:
    """A depthwise-separable block around one depthwise match.

    expand: the 1x1 convolution that feeds it (PW1), if any. project: the one it feeds (PW2).
    squeeze_excite: the depthwise output is gated per channel before PW2. residual: PW2's output is added to a skip.
    """

    depthwise: Match
    project: Match
    expand: Match | None = None
    squeeze_excite: bool = False
    residual: bool = False

    def of(self, matches: Mapping[Match, Match]) -> Block:
        """Return the block with other matches in the place of its own."""
        expand = None if self.expand is None else matches.get(self.expand, self.expand)
        ours = [matches.get(match, match) for match in (self.depthwise, self.project)]
        return replace(self, depthwise=ours[0], project=ours[1], expand=expand)

    @property
    def kind(self) -> str:
        return "inverted_residual" if self.expand is not None else "depthwise_separable"
