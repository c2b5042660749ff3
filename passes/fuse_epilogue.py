"""Take what follows a kernel into its epilogue: the residual add, then the activation.

    act(tile_gemm(x, w) + skip)  =>  tile_gemm(x, w, residual=skip, activation=act)      tile_conv likewise
    act(depthwise_taps(x, w))    =>  depthwise_taps(x, w, activation=act)
    act(unflatten(tile_gemm(x, w)))  =>  unflatten(tile_gemm(x, w, activation=act))      squeeze likewise

Does not fire when the kernel's result has another user, or when an activation sits between kernel and add.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ..context import Context
from ..graph import aten, is_call, mutation_between, same_dtype, same_shape, sole_user

_RESIDUAL = 6
_ACTIVATIONS: dict[Any, str] = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.hardswish.default: "hardswish",
    aten.hardsigmoid.default: "hardsigmoid",
    aten.sigmoid.default: "sigmoid",
}


def activation_name(node: Node) -> str | None:
    """Return the epilogue's name of an activation call, ``None`` when it has none."""
    if is_call(node, aten.hardtanh.default):
        return "relu6" if tuple(node.args[1:3]) == (0.0, 6.0) else None
    if is_call(node, aten.gelu.default):
        return "gelu" if node.kwargs.get("approximate", "none") == "none" else "gelu_tanh"
    return _ACTIVATIONS.get(node.target) if node.op == "call_function" else None


def fuse_epilogue(gm: GraphModule, ctx: Context) -> int:
    """Return the number of calls fused. Only outside training: there the parts stay differentiable apart."""
    if not ctx.inference:
        return 0
    fused = 0
    for node in list(gm.graph.nodes):
        if is_call(node, torch.ops.fxprune.tile_gemm.default, torch.ops.fxprune.tile_conv.default):
            fused += _fuse_residual(node) + _fuse_activation(node)
        elif is_call(node, torch.ops.fxprune.depthwise_taps.default):
            fused += _fuse_activation(node)
    return fused


def _fuse_residual(node: Node) -> bool:
    add = sole_user(node)
    if not is_call(add, aten.add.Tensor) or add.kwargs or node.args[_RESIDUAL] is not None or node.args[-1] != "none":
        return False
    skip = add.args[1] if add.args[0] is node else add.args[0]
    if skip is node or not same_shape(skip, node) or not same_dtype(skip, node) or mutation_between(node, add):
        return False
    _move_to(node, add)
    node.update_arg(_RESIDUAL, skip)
    return True


def _fuse_activation(node: Node) -> bool:
    user, view = sole_user(node), None
    # a 1x1 map between linear kernels, a sequence as an image: the activation moves in front of the view
    if is_call(user, aten.unflatten.int, aten.squeeze.dim):
        view, user = user, sole_user(user)
    name = activation_name(user) if user is not None else None
    if user is None or name is None or node.args[-1] != "none" or mutation_between(node, user):
        return False
    if view is None:
        _move_to(node, user)
    else:
        user.replace_all_uses_with(view)
        user.graph.erase_node(user)
    node.update_arg(len(node.args) - 1, name)
    return True


def _move_to(node: Node, consumer: Node) -> None:
    """Let ``node`` take the place of its only consumer, after everything the consumer reads."""
    consumer.append(node)
    consumer.replace_all_uses_with(node)
    consumer.graph.erase_node(consumer)
