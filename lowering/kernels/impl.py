"""One implementation of a semantic operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Impl:
    """``supports(x, weight)`` returns ``None`` for yes, else the reason; it feeds reports and errors."""

    op: str
    provider: str
    fn: Callable[..., Any]
    supports: Callable[..., str | None]
