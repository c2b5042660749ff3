"""Operators that no graph has: a training loop and the planner call them. They have no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxprune.ops import add_squares, clear_pruned, plan_tiles

REFERENCES: dict[str, Callable[..., Any]] = {
    "clear_pruned": clear_pruned.reference,
    "add_squares": add_squares.reference,
    "tile_scores": plan_tiles.tile_scores,
    "keep_best": plan_tiles.keep_best,
    "held_scores": plan_tiles.held_scores,
    "shared_rows": plan_tiles.shared_rows,
    "tile_counts": plan_tiles.tile_counts,
    "zero_outside": plan_tiles.zero_outside,
}


def define(compiled: bool) -> torch.library.Library:
    """Attach the references: beside compiled kernels for GPUs alone. They live as long as the result."""
    lib = torch.library.Library("fxprune", "FRAGMENT")
    for name in ("clear_pruned", "add_squares"):
        torch.library.register_fake(f"fxprune::{name}", lambda *args: None, lib=lib)
    for name, reference in REFERENCES.items():
        lib.impl(name, reference, "CUDA" if compiled else "CompositeExplicitAutograd")
    return lib
