"""The references as implementations: they run anything, and are never called fast."""

from __future__ import annotations

from ...ops import OPS
from .impl import Impl

IMPLS = tuple(Impl(op.name, "reference", op.reference, lambda *operands: None) for op in OPS)
