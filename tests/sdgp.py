"""The oracle of SDGP: eager layers whose data gradient reads a pruned copy, each an autograd.Function written by hand."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from fxprune.passes.sdgp import Sdgp
from torch import Tensor, nn
from torch.fx import Graph
from torch.overrides import TorchFunctionMode

from fxprune.ops.nm_prune import OPERATOR

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


class Layer(torch.autograd.Function):
    """call(x, w, b), whose input gradient is that of prune(dL/dO)."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Tensor], prune: Callable[[Tensor], Tensor], x: Tensor, *rest: Any) -> Tensor:
        ctx.call, ctx.prune, ctx.operands = call, prune, (x, *rest)
        with torch.no_grad():
            return call(x, *rest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        operands = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in ctx.operands]
        with torch.enable_grad():
            y = ctx.call(*operands)
        given = [t for t in operands[1:] if isinstance(t, Tensor)]
        (data,) = torch.autograd.grad(y, operands[0], ctx.prune(grad), retain_graph=True)
        others = iter(torch.autograd.grad(y, given, grad))
        return None, None, data, *[next(others) if isinstance(t, Tensor) else None for t in operands[1:]]


@dataclass
class Oracle(TorchFunctionMode):
    """While it is active, every eligible layer of ``model`` runs as :class:`Layer`. pruned: how many did."""

    model: nn.Module
    n: int = 2
    m: int = 4
    function: str = "magnitude"
    key: tuple[int, int, int] = (0, 0, 0)
    pruned: int = 0
    uses: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()
        self.names = {id(p): n for n, p in self.model.named_parameters()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        product = func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and id(args[1]) in self.names
        if func not in (*CONVOLUTIONS, F.linear) and not product:
            return func(*args, **kwargs)
        x, weight, *more = args
        bias, rest = (more[0] if more else kwargs.pop("bias", None)), more[1:]
        y = func(*args, **kwargs)
        groups = 1 if func not in CONVOLUTIONS else self._groups(func, rest, kwargs)
        dim = 1 if func in CONVOLUTIONS else -1
        parameter = self.names.get(id(weight), "")
        name = parameter.rpartition(".")[0] or parameter
        self.uses[name] += 1
        first = dim == 1 and x.shape[1] <= 3
        if first or not x.requires_grad or y.shape[dim] in (1, groups):
            return y
        self.pruned += 1
        number = zlib.crc32(f"{name}#{self.uses[name]}".encode())

        def call(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return func(x, weight) if product else func(x, weight, bias, *rest, **kwargs)

        def prune(grad: Tensor) -> Tensor:
            key = torch.tensor(self.key)
            return OPERATOR.reference(grad, key, self.n, self.m, dim, groups, self.function, number)

        with torch._C.DisableTorchFunction():
            return Layer.apply(call, prune, x, weight, bias)

    @staticmethod
    def _groups(func: Any, rest: list[Any], kwargs: dict[str, Any]) -> int:
        return rest[3] if len(rest) > 3 else kwargs.get("groups", 1)  # after stride, padding, and dilation or output padding


@dataclass
class Seen:
    """What the pass returned, and the operators of each joint graph after it."""

    pruned: list[int] = field(default_factory=list)
    operators: list[Counter[str]] = field(default_factory=list)


@contextmanager
def watched() -> Iterator[Seen]:
    """Record what the pass does while the block runs."""
    seen, original = Seen(), Sdgp.__call__

    def spy(self: Sdgp, graph: Graph) -> int:
        count = original(self, graph)
        seen.pruned.append(count)
        seen.operators.append(Counter(str(n.target) for n in graph.nodes if n.op == "call_function"))
        return count

    Sdgp.__call__ = spy  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        Sdgp.__call__ = original  # type: ignore[method-assign]


def gradients(model: nn.Module, call: Callable[..., Any], *inputs: Tensor, upstream: Tensor | None = None) -> dict[str, Any]:
    """Return the gradient of every parameter and of ``inputs`` for an integer cotangent."""
    for parameter in model.parameters():
        parameter.grad = None
    inputs = tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in inputs)
    y = call(*inputs)
    if upstream is None:
        gen = torch.Generator().manual_seed(3)
        upstream = torch.randint(-4, 5, y.shape, generator=gen).to(y.dtype)
    y.backward(upstream)
    found = {name: p.grad for name, p in model.named_parameters()}
    return {**found, **{f"input {i}": x.grad for i, x in enumerate(inputs)}}
