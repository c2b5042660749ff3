"""What a semantic operator is: a reference, a fake, a backward, samples and bad samples, in one record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Args = tuple[Any, ...]


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
