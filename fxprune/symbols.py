"""The symbolic sizes of one Dynamo compile, kept so that the graph can be compiled again for other weights.

Dynamo hands its backend a fake mode in which the example inputs have symbolic sizes. What a backend adds, and what
replaces a weight later, must enter that mode with fixed sizes: a dimension of 2 beside a batch of 2 would otherwise
become the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch.utils.weak import WeakTensorKeyDictionary


class Symbols:
    """Create it while Dynamo compiles; it keeps the fake mode and what Dynamo said about each example input."""

    def __init__(self, example_inputs: Sequence[Any]) -> None:
        self._mode: Any = detect_fake_mode(list(example_inputs))
        self._fakes: list[Tensor] = []
        self._positions = {v.node.expr: i for i, v in enumerate(example_inputs) if isinstance(v, torch.SymInt)}
        context = TracingContext.try_get()
        # a copy: Dynamo empties its own when the compile ends
        self._sizes = None if context is None else WeakTensorKeyDictionary(context.tensor_to_context)

    def sizes(self, args: Sequence[Any]) -> dict[Any, tuple[int, int]]:
        """Return the position among the graph's arguments and the value, or hint, of each symbolic size that is one."""
        found = {}
        for expr, i in self._positions.items():
            value = args[i].node.hint if isinstance(args[i], torch.SymInt) else args[i]
            if value is not None:
                found[expr] = (i, int(value))
        return found

    def fix(self, tensors: Sequence[Tensor]) -> None:
        """Enter real tensors in the fake mode with the sizes they have."""
        if self._mode is not None:  # which finds a fake again only while somebody holds it
            self._fakes += [self._mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Compile inside as Dynamo's own compile did.

        Raises ``RuntimeError`` when that narrows the sizes, because no Dynamo guard would keep other sizes out.
        """
        if self._mode is None:
            yield
            return
        context = TracingContext(self._mode)
        if self._sizes is not None:
            context.tensor_to_context = self._sizes
        before = self._narrowed()
        with tracing(context):
            yield
        if self._narrowed() != before:
            raise RuntimeError("the rebuilt graph needs a guard on a size that Dynamo does not hold")

    def _narrowed(self) -> tuple[int, int]:
        shapes = self._mode.shape_env
        return (0, 0) if shapes is None else (len(shapes.guards), len(shapes.replacements))
