"""Marks of a layer's result in the graph and of the gradient that comes back to it. They compute nothing.

    y = conv(x, w)  =>  y = mark_output(conv(x, w), key, layer, dim, groups)

A mark before autograd leaves ``mark_gradient(dL/dO, ...)`` in the backward graph, with the key of the step beside it;
``passes/sdgp.py`` reads the marks there and removes both kinds. One that is left, in a graph the pass never saw, is a copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxprune.ops.operator import Args

NAMESPACE = "fxprune_mark"
_OPERANDS = "Tensor x, Tensor key, int layer, int dim, int groups"
_NAMES = ("output", "gradient")


def define() -> torch.library.Library:
    """Register both operators; they live as long as the result."""
    lib = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name in _NAMES:
        lib.define(f"{name}({_OPERANDS}) -> Tensor")
        lib.impl(name, _copy, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", _fake, lib=lib)
    torch.library.register_autograd(f"{NAMESPACE}::output", _backward, setup_context=_setup_context, lib=lib)
    return lib


def _copy(x: Tensor, key: Tensor, layer: int, dim: int, groups: int) -> Tensor:
    return x.clone()


def _fake(x: Tensor, key: Tensor, layer: int, dim: int, groups: int) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: Args, output: Tensor) -> None:
    _, key, *ctx.fields = inputs
    ctx.save_for_backward(key)


def _backward(ctx: Any, grad: Tensor) -> Args:
    (key,) = ctx.saved_tensors
    return torch.ops.fxprune_mark.gradient(grad, key, *ctx.fields), None, None, None, None
