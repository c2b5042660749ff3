"""Mark the layers whose data gradient ``grad_sparsity`` prunes, before autograd.

    y = conv2d(x, w) / linear(x, w) / x @ w   =>   y = fxprune_mark::output(y, key, layer, dim, groups)

Not marked: layers whose input needs no gradient, ignored ones, convolutions of an image's few channels (the authors skip
them: arXiv 2202.00774, code), depthwise ones, whose data gradient adds nothing up, and types that have no kernel.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node

from ..context import Context
from ..errors import NoGradientPruned
from ..gradients import GradientLayer, GradientTimes
from ..graph import argument, aten, call, fake, is_call, shape
from ..planner import hits
from ..weights import qualified_name

_CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
# Dynamo's calls of those that normalize leaves alone, with the position of `groups`
_CALLS = {"conv3d": 6, "conv_transpose1d": 6, "conv_transpose2d": 6, "conv_transpose3d": 6}
_PRODUCTS = (aten.mm.default, aten.matmul.default, aten.addmm.default)
_IMAGE_CHANNELS = 3
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def mark_gradients(gm: GraphModule, ctx: Context) -> int:
    """Return the number of layers marked; ``ctx.gradients`` lists every convolution and linear layer."""
    if ctx.gradient_ratio is None:
        return 0
    matched = {m.node for m in ctx.matches if m.kind == "linear"}
    needs = _needs_gradient(gm, ctx)
    names: dict[str, int] = {}
    layers = [node for node in gm.graph.nodes if _is_layer(node, matched)]
    for node in layers:
        name = _name(node, ctx)
        number = names[name] = names.get(name, 0) + 1
        label = name if number == 1 else f"{name} (use {number})"
        layer = GradientLayer(label, _number(name, number), _refusal(node, name, needs, ctx))
        ctx.gradients.append(_timed(layer, node, ctx))
    ctx.gradients = [_confirmed(layer, node, ctx) for node, layer in zip(layers, ctx.gradients, strict=True)]
    chosen = [(n, layer) for n, layer in zip(layers, ctx.gradients, strict=True) if layer.reason is None]
    if not chosen and ctx.gradient_ratio.auto:
        return 0
    if not chosen:
        if any(isinstance(value, FakeTensor) for _, value in ctx.weights.given()):
            return 0  # a part of a model that DDP splits: others may hold layers
        warnings.warn(NoGradientPruned(ctx.gradient_ratio, "; ".join(map(str, ctx.gradients[:3]))), stacklevel=2)
        return 0
    seed = ctx.config.seed
    (ctx.gradient_key,) = ctx.weights.derive(["gradient_key"], (), lambda: (torch.tensor([seed, 0, 0]),))
    for node, layer in chosen:
        dim = 1 if _is_convolution(node) else -1
        mark = call(
            node.next, torch.ops.fxprune_mark.output.default, node, ctx.gradient_key, layer.number, dim, _groups(node)
        )
        node.replace_all_uses_with(mark, delete_user_cb=lambda user, mark=mark: user is not mark)
    return len(chosen)


def _is_layer(node: Node, matched: set[Node]) -> bool:
    return _is_convolution(node) or is_call(node, aten.linear.default) or (is_call(node, *_PRODUCTS) and node in matched)


def _is_convolution(node: Node) -> bool:
    return is_call(node, *_CONVOLUTIONS) or (node.op == "call_function" and _function(node) in _CALLS)


def _function(node: Node) -> str:
    return getattr(node.target, "__name__", "")


def _groups(node: Node) -> int:
    if not _is_convolution(node):
        return 1
    if is_call(node, *_CONVOLUTIONS):
        return int(argument(node, "groups"))
    position = _CALLS[_function(node)]
    given = node.args[position] if len(node.args) > position else node.kwargs.get("groups", 1)
    return int(given)  # type: ignore[arg-type]


def _operands(node: Node) -> tuple[Any, Any]:
    """Return (x, weight)."""
    first = 1 if is_call(node, aten.addmm.default) else 0
    x = node.args[first] if len(node.args) > first else node.kwargs.get("input")
    weight = node.args[first + 1] if len(node.args) > first + 1 else node.kwargs.get("weight")
    return x, weight


def _name(node: Node, ctx: Context) -> str:
    """Return the layer's qualified name: its weight's, or for a computed weight its module's."""
    weight = _operands(node)[1]
    match = next((m for m in ctx.matches if m.node is node), None)
    if match is not None:
        return match.name
    if ctx.weights.value(weight) is not None:
        parameter = qualified_name(ctx.weights.origin(weight))
        return parameter.rpartition(".")[0] or parameter
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else node.name


def _refusal(node: Node, name: str, needs: Callable[[Any], bool], ctx: Context) -> str | None:
    """Return why a layer is not marked, ``None`` when it is."""
    x, _ = _operands(node)
    value, groups = fake(node), _groups(node)
    if value is None or value.dtype not in _DTYPES:
        return f"its result is {getattr(value, 'dtype', 'unknown')}; float32, bfloat16 and float16 have a kernel"
    if not needs(x) and ctx.config.grad_target == "dX":
        return "its input needs no gradient"
    if any(hits(key, name, f"{name}.weight") for key in ctx.config.ignored_layers):
        return "ignored_layers names it"
    if _is_convolution(node):
        sizes = shape(x) or ()
        if value.dim() != len(sizes) or value.dim() < 3 or len(sizes) != _rank(node):
            return "its input has no batch dimension"
        if isinstance(sizes[1], int) and sizes[1] <= _IMAGE_CHANNELS:
            return f"a first layer: {sizes[1]} input channels"
        if value.shape[1] == groups:
            return "depthwise: its data gradient adds up no channels"
    elif value.shape[-1] == 1:
        return "it has one output feature"
    return None


def _timed(layer: GradientLayer, node: Node, ctx: Context) -> GradientLayer:
    """Add what was measured; with "auto", pruning that is not measured to be faster is refused."""
    ratio = ctx.gradient_ratio
    if layer.reason is not None or ratio is None or ctx.measure_gradient is None:
        return layer
    dim = 1 if _is_convolution(node) else -1
    times = ctx.measure_gradient(node, _operands(node)[0], dim, _groups(node), ratio)
    if times is None:
        return replace(layer, reason="its time was not measured") if ratio.auto else layer
    return replace(layer, reason=_slow(times, ctx) if ratio.auto else None, times=times)


def _confirmed(layer: GradientLayer, node: Node, ctx: Context) -> GradientLayer:
    """With "auto", time a layer that won again once all were timed: other work on the machine does not decide twice."""
    if layer.reason is not None or layer.times is None or not (ctx.gradient_ratio and ctx.gradient_ratio.auto):
        return layer
    times = _timed(layer, node, ctx).times or layer.times
    worse = min(layer.times, times, key=lambda t: t.dense / t.best)
    return replace(layer, reason=_slow(worse, ctx), times=worse)


def _slow(times: GradientTimes, ctx: Context) -> str | None:
    if times.dense >= ctx.config.min_speedup * times.best:
        return None
    return f"pruned it is {times.dense / times.best:.2f} times as fast"


def _rank(node: Node) -> int:
    """Return the number of dimensions of a batch."""
    name = _function(node).partition(".")[0]
    return 2 + int(next(c for c in name if c.isdigit()))


def _number(name: str, use: int) -> int:
    """Return a number that is the same for this use of a layer in every graph, process and run."""
    return zlib.crc32(f"{name}#{use}".encode())


def _needs_gradient(gm: GraphModule, ctx: Context) -> Callable[[Any], bool]:
    """Return a predicate over nodes: may a gradient flow into it? Too often yes costs nothing."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        value = ctx.weights.value(node)
        tensor = value if value is not None else fake(node)
        own = node.op in ("placeholder", "get_attr") and isinstance(tensor, Tensor) and tensor.requires_grad
        if own or any(n in found for n in node.all_input_nodes):
            found.add(node)
    return lambda node: node in found
