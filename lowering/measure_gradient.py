"""Time one layer's data gradient with dL/dO pruned and dense, at the shapes of the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils._pytree import tree_map

from ..config import Config
from ..cost import hint
from ..gradients import Ratio
from ..graph import fake
from . import library
from .measure import ROUNDS, interleave


class MeasureGradient:
    """Callable ``(node, x, dim, groups, ratio) -> (pruned, dense)`` microseconds; ``None`` when nothing is to be timed."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def __call__(self, node: Node, x: Node, dim: int, groups: int, ratio: Ratio) -> tuple[float, float] | None:
        """node: the layer's call before autograd, ``x`` its input."""
        if self._config.autotune == "off" or not library.available():
            return None
        real = {n: _random(n) for n in node.all_input_nodes}
        args, kwargs = (tree_map(lambda a: real.get(a, a), v) for v in (node.args, node.kwargs))
        with torch.inference_mode(False), torch.enable_grad():
            data = real[x].requires_grad_()
            target: Any = node.target
            y = target(*args, **kwargs)
            grad, key = torch.randn_like(y), torch.zeros(3, dtype=torch.int64)

            def dense() -> Tensor:
                return torch.autograd.grad(y, data, grad, retain_graph=True)[0]

            def pruned() -> Tensor:
                rest = (ratio.n, ratio.m, dim, groups, self._config.grad_pruning, 0)
                less = torch.ops.fxprune.nm_prune(grad, key, *rest)
                return torch.autograd.grad(y, data, less, retain_graph=True)[0]

            (first, second), _ = interleave([pruned, dense], ROUNDS[self._config.autotune])
        return first, second


def _random(node: Node) -> Tensor:
    """Return random values of a node's sizes, strides and type."""
    value = fake(node)
    if value is None:
        raise ValueError(f"{node} is no tensor")
    sizes, strides = ([hint(s) for s in dims] for dims in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device).normal_()
