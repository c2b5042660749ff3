"""Activations an operator can carry in its epilogue: name, ATen form, derivative."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

aten = torch.ops.aten

FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": aten.relu.default,
    "relu6": lambda x: aten.hardtanh.default(x, 0.0, 6.0),
    "silu": aten.silu.default,
    "hardswish": aten.hardswish.default,
    "hardsigmoid": aten.hardsigmoid.default,
    "sigmoid": aten.sigmoid.default,
    "gelu": lambda x: aten.gelu.default(x, approximate="none"),
    "gelu_tanh": lambda x: aten.gelu.default(x, approximate="tanh"),
}

# gradient of the pre-activation from (gradient of the output, pre-activation)
BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda g, x: g,
    "relu": lambda g, x: aten.threshold_backward.default(g, x, 0.0),
    "relu6": lambda g, x: aten.hardtanh_backward.default(g, x, 0.0, 6.0),
    "silu": aten.silu_backward.default,
    "hardswish": aten.hardswish_backward.default,
    "hardsigmoid": aten.hardsigmoid_backward.default,
    "sigmoid": lambda g, x: aten.sigmoid_backward.default(g, aten.sigmoid.default(x)),
    "gelu": lambda g, x: aten.gelu_backward.default(g, x, approximate="none"),
    "gelu_tanh": lambda g, x: aten.gelu_backward.default(g, x, approximate="tanh"),
}

NAMES = tuple(FORWARD)
