"""Residual and activation go into the kernel before them, in that order, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from tests.oracle import Run, check, compiled, integer_model, integers, zero_some

X, ROWS = integers(2, 8, 6, 6, seed=3), integers(2, 5, 8, seed=4)
_RESIDUAL, _ACTIVATION = 6, -1


class Layer(nn.Module):
    """A layer and what ``body(y, x)`` does with its result."""

    def __init__(self, kind: str, body: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        layers = {
            "pointwise": lambda: nn.Conv2d(8, 8, 1),
            "depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
            "linear": lambda: nn.Linear(8, 8),
        }
        self.layer, self.body = layers[kind](), body

    def forward(self, x: Tensor) -> object:
        return self.body(self.layer(x), x)


def run(kind: str, body: Callable[[Tensor, Tensor], object]) -> Run:
    model = integer_model(Layer(kind, body))
    zero_some(model, step=1) if kind == "depthwise" else model.layer.weight.data[:, ::2].zero_()
    return check(model, (ROWS if kind == "linear" else X).clone())


def kernel(result: Run) -> tuple[object, str]:
    """Return (residual operand, activation) of the only kernel."""
    (node,) = [n for n in result.graph.graph.nodes if "fxprune" in str(n.target)]
    return (node.args[_RESIDUAL] if "tile_gemm" in str(node.target) else None), str(node.args[_ACTIVATION])


GEMMS, KINDS = ("pointwise", "linear"), ("pointwise", "linear", "depthwise")
ACTIVATIONS = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_fuses(kind: str, name: str) -> None:
    result = run(kind, lambda y, x: ACTIVATIONS[name](y))
    assert kernel(result) == (None, name) and sum(result.ops.values()) == 1


@pytest.mark.parametrize("kind", GEMMS)
@pytest.mark.parametrize("swap", [False, True])
def test_residual_then_activation_fuse(kind: str, swap: bool) -> None:
    result = run(kind, lambda y, x: F.relu(x + y if swap else y + x))
    residual, name = kernel(result)
    assert residual is not None and name == "relu" and sum(result.ops.values()) == 1


TWINS: dict[str, tuple[Callable[[Tensor, Tensor], object], bool, str]] = {
    # body, whether a residual fuses, the activation that fuses
    "extra user": (lambda y, x: (F.relu(y), y * 2), False, "none"),
    "graph output": (lambda y, x: (y, F.relu(y)), False, "none"),
    "activation before the add": (lambda y, x: F.relu(y) + x, False, "relu"),
    "add twice": (lambda y, x: (y + x) + x, True, "none"),
    "add to itself": (lambda y, x: y + y, False, "none"),
    "broadcast residual": (lambda y, x: y + x[:1], False, "none"),
    "widening residual": (lambda y, x: torch.cat([x, x]).unsqueeze(0) + torch.cat([y, y]), False, "none"),
    "number": (lambda y, x: y + 1, False, "none"),
    "scaled add": (lambda y, x: torch.add(y, x, alpha=2), False, "none"),
    "subtraction": (lambda y, x: y - x, False, "none"),
    "two activations": (lambda y, x: F.relu(F.relu6(y)), False, "relu6"),
    "leaky": (lambda y, x: F.leaky_relu(y, 0.5), False, "none"),
    "mutation before the add": (lambda y, x: (x.mul_(2), y + x)[1], False, "none"),
    "view between": (lambda y, x: F.relu(y.flatten()), False, "none"),
    "integer residual": (lambda y, x: y + x.long(), False, "none"),
}


@pytest.mark.parametrize("kind", GEMMS)
@pytest.mark.parametrize("name", TWINS)
def test_twin_fuses_only_what_is_right(kind: str, name: str) -> None:
    body, residual, activation = TWINS[name]
    given = kernel(run(kind, body))
    assert (given[0] is not None, given[1]) == (residual, activation)


def test_a_wider_residual_keeps_its_dtype() -> None:
    model = integer_model(Layer("linear", lambda y, x: y + x.double()))
    model.layer.weight.data[:, ::2].zero_()
    result = check(model, ROWS)
    assert kernel(result)[0] is None and result.output[0].dtype == torch.float64


def test_residual_computed_after_the_layer() -> None:
    result = run("pointwise", lambda y, x: F.relu6(y + torch.flip(x, (2,)) + 4))
    assert kernel(result)[0] is not None and kernel(result)[1] == "none"


def test_depthwise_takes_no_residual() -> None:
    result = run("depthwise", lambda y, x: F.relu(y + x))
    assert kernel(result)[1] == "none" and result.ops["add"] == 1 and result.ops["relu"] == 1


def test_nothing_fuses_in_training() -> None:
    model = integer_model(Layer("linear", lambda y, x: F.relu(y + x)))
    pruned = fxprune.prune(model, ROWS, sparsity=0.5, granularity=4).model
    fast = compiled(pruned)
    y = fast.call(ROWS)
    assert y.requires_grad and torch.equal(y, pruned(ROWS))
    (context,) = fast.contexts
    assert context.counts["fuse_epilogue"] == 0 and context.counts["rewrite_gemm"] == 1
