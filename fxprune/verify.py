"""``fxprune.verify``: does the compiled model compute what the model computes?"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxprune.capture import arguments, evaluating
from fxprune.config import Config
from fxprune.errors import VerificationError
from fxprune.report import Table


def verify(model: nn.Module, example_inputs: Any, *, compiled: Any = None, **options: Any) -> Table:
    """Compare the compiled model with an fp64 run of the model, beside eager's own error.

    compiled: a compiled model to check; by default ``torch.compile(model, backend="hwprune", options=options)``.
    The bound is relative to the largest output: ``max(tolerance, 2 * eager's error)``.
    Raises :class:`~fxprune.errors.VerificationError` when an output differs; returns the errors otherwise.
    """
    config = Config.from_options(options)
    args, kwargs = arguments(example_inputs)
    fast = compiled if compiled is not None else torch.compile(model, backend="hwprune", options=dict(options))
    with evaluating(model), torch.no_grad():
        exact_model = copy.deepcopy(model).double()
        exact = exact_model(*tree_map(_double, args), **tree_map(_double, kwargs))
        eager, given = model(*args, **kwargs), fast(*args, **kwargs)
    rows = []
    outputs = [_tensors(output) for output in (exact, eager, given)]
    if len(outputs[1]) != len(outputs[2]):
        expected = f"{len(outputs[1])} tensors"
        raise VerificationError(stage="verify", what="output", given=f"{len(outputs[2])} tensors", expected=expected)
    for i, (a, b, c) in enumerate(zip(*outputs, strict=True)):
        if b.shape != c.shape or b.dtype != c.dtype:
            expected = f"{b.dtype} {tuple(b.shape)}"
            raise VerificationError(
                stage="verify", what=f"output {i}", given=f"{c.dtype} {tuple(c.shape)}", expected=expected
            )
        reference, ours = _error(b, a), _error(c, a)
        bound = max(config.tolerance, 2 * reference)
        if not ours <= bound:
            raise VerificationError(
                stage="verify", what=f"output {i}", given=f"error {ours:.3g}", expected=f"at most {bound:.3g}"
            )
        rows.append((i, tuple(b.shape), f"{reference:.2e}", f"{ours:.2e}"))
    return Table("relative error against fp64", ("output", "shape", "eager", "compiled"), rows)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor)]


def _error(value: Tensor, exact: Tensor) -> float:
    if not value.numel() or not exact.is_floating_point():
        return 0.0 if torch.equal(value, exact) else float("inf")
    scale = exact.abs().max().clamp_min(1e-30)
    return ((value.double() - exact).abs().max() / scale).item()
