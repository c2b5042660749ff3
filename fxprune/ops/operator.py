"""What a semantic operator is: a reference, a fake, a backward, samples and bad samples, in one record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Args = tuple[Any, ...]


def widened(*tensors: Tensor | None) -> list[Any]:
    """Return 16-bit tensors as float32, the precision of every sum; others as they are."""
    halves = (torch.bfloat16, torch.float16)
    return [t.float() if t is not None and t.dtype in halves else t for t in tensors]


def without_gradient(name: str) -> tuple[Callable[..., None], Callable[..., Any]]:
    """Return the setup_context and the backward of an operator that passes put into inference graphs alone."""

    def setup_context(ctx: Any, inputs: Args, output: Any) -> None:
        pass

    def backward(ctx: Any, *grads: Tensor) -> Args:
        raise RuntimeError(f"fxprune::{name} has no gradient: it is made for inference. Call it under torch.no_grad().")

    return setup_context, backward


@dataclass(frozen=True)
class Operator:
    """One ``fxprune::`` operator.

    reference: plain PyTorch; it is the fallback kernel and the oracle of every test.
    fake: output metadata from input metadata. setup_context / backward: its gradient.
    samples: argument tuples for opcheck and gradcheck. bad_samples: (arguments, message regex).
    """

    name: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    setup_context: Callable[..., None]
    backward: Callable[..., Any]
    samples: Callable[[], Iterator[Args]]
    bad_samples: Callable[[], Iterator[tuple[Args, str]]]

    @property
    def qualname(self) -> str:
        return f"fxprune::{self.name}"
