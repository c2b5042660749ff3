"""Time one layer's data gradient at the shapes of the graph: dense, pruned, and pruned with a product that skips zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map

from ..config import Config
from ..cost import hint
from ..gradients import GradientTimes, Ratio
from ..graph import argument, aten, fake, is_call
from ..ops import nm_mm
from . import library
from .kernels import libraries
from .measure import ROUNDS, interleave

_PRODUCTS = (aten.linear.default, aten.mm.default, aten.matmul.default, aten.addmm.default)
_CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)


class MeasureGradient:
    """Callable ``(node, x, dim, groups, ratio) -> GradientTimes``; ``None`` when nothing is to be timed."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __call__(self, node: Node, x: Node, dim: int, groups: int, ratio: Ratio) -> GradientTimes | None:
        """node: the layer's call before autograd, ``x`` its input."""
        if self._config.autotune == "off" or not library.available():
            return None
        real = {n: _random(n) for n in node.all_input_nodes}
        args, kwargs = (tree_map(lambda a: real.get(a, a), v) for v in (node.args, node.kwargs))
        target: Any = node.target
        key = torch.zeros(3, dtype=torch.int64)
        with torch.inference_mode(False), torch.enable_grad():
            data = real[x].requires_grad_()
            y = target(*args, **kwargs)
            grad = torch.randn_like(y)

            def prune() -> Tensor:
                rest = (ratio.n, ratio.m, dim, groups, self._config.grad_pruning, 0)
                return torch.ops.fxprune.nm_prune(grad, key, *rest)

            def dense(given: Tensor) -> Tensor:
                return torch.autograd.grad(y, data, given, retain_graph=True)[0]

            weight = None if self._config.grad_target == "dW" else _weight(node, real, dim, ratio)
            if weight is None:
                (pruned, plain), _ = interleave([lambda: dense(prune()), lambda: dense(grad)], self._rounds)
                return GradientTimes(plain, pruned)
        with torch.no_grad():
            product, skipping = _product(node, real[x], weight), _skipping(node, weight, dim)
            itself = grad.dtype != torch.float32 and nm_mm.prunes(self._config.grad_pruning, ratio.n, ratio.m)
            runs = [
                lambda: product(prune()),
                lambda: product(grad),
                lambda: skipping(grad if itself else prune()),
            ]
            if by_library := grad.dtype != torch.float32 and libraries.chosen(grad.device, grad.dtype) is not None:
                matrix = torch.ops.fxprune_library.nm_mm
                runs.append(lambda: matrix((grad if itself else prune()).reshape(-1, grad.shape[-1]), weight))
            (pruned, plain, *skipped), _ = interleave(runs, self._rounds)
        return GradientTimes(plain, pruned, skipped[0], skipped[1] if by_library else None)

    @property
    def _rounds(self) -> int:
        return ROUNDS[self._config.autotune]


def _weight(node: Node, real: dict[Node, Tensor], dim: int, ratio: Ratio) -> Tensor | None:
    """Return the weight where a product that skips zeros computes the data gradient, else ``None``.

    (N, K) of a product of matrices, (N, K, R, S) of a convolution with a window. In 16 bits matrices on a GPU alone.
    """
    weight = _operand(node, real, dim)
    if weight is None or all(t.dtype == torch.float32 for t in real.values()):
        return weight
    return weight if dim == -1 and nm_mm.runs(weight.t(), weight, ratio.n, ratio.m) else None


def _operand(node: Node, real: dict[Node, Tensor], dim: int) -> Tensor | None:
    """Return the weight as :func:`_weight` does, in any type."""
    if not is_call(node, *_PRODUCTS, *_CONVOLUTIONS):
        return None
    position = 2 if is_call(node, aten.addmm.default) else 1
    weight = real.get(node.args[position])  # type: ignore[arg-type]
    if weight is None:
        return None
    if dim == -1:
        return None if weight.dim() != 2 else weight if is_call(node, aten.linear.default) else weight.t()
    padding, window = argument(node, "padding"), weight.shape[2:]
    if isinstance(padding, str) or any(v != 1 for v in (*argument(node, "stride"), argument(node, "groups"))):
        return None
    if all(v == 1 for v in window):
        return None if any(padding) else weight.flatten(1)
    inside = all(pad < size for pad, size in zip(padding, window, strict=True))
    return weight if weight.dim() == 4 and inside and all(v == 1 for v in argument(node, "dilation")) else None


def _product(node: Node, x: Tensor, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the dense data gradient as the backward graph calls it."""
    if not is_call(node, *_CONVOLUTIONS):
        return lambda grad: grad.reshape(-1, grad.shape[-1]) @ weight
    ones, zeros = [1] * (x.dim() - 2), [0] * (x.dim() - 2)
    kernel = weight.reshape(*weight.shape[:2], *(weight.shape[2:] or ones))
    if x.dim() == 4 and not x.is_contiguous():
        kernel = kernel.contiguous(memory_format=torch.channels_last)
    rest = (ones, list(argument(node, "padding")), ones, False, zeros, 1, [True, False, False])
    return lambda grad: aten.convolution_backward(grad, x, kernel, None, *rest)[0]


def _skipping(node: Node, weight: Tensor, dim: int) -> Callable[[Tensor], Tensor]:
    """Return the data gradient that skips zeros."""
    if weight.dim() == 4:
        padding = list(argument(node, "padding"))
        return lambda grad: torch.ops.fxprune.skip_zeros_conv(grad, weight, padding)
    if weight.dtype != torch.float32:
        return lambda grad: torch.ops.fxprune.nm_mm(grad.reshape(-1, grad.shape[-1]), weight)
    flat = dim == -1
    return lambda grad: torch.ops.fxprune.skip_zeros_mm(grad.reshape(-1, grad.shape[-1]) if flat else grad, weight, dim)


def _random(node: Node) -> Tensor:
    """Return random values of a node's sizes, strides and type."""
    value = fake(node)
    if value is None:
        raise ValueError(f"{node} is no tensor")
    sizes, strides = ([hint(s) for s in dims] for dims in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device).normal_()
