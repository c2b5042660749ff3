"""Checkpointed layers prune and run sparse in inference, where nothing is recomputed; in training they stay in the call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxprune
from tests.oracle import assert_exact, compiled, integer_model, rewritten
from tests.toys import pruned, rows, run


class Checkpointed(nn.Module):
    """Two checkpointed layers, the second inside two of them and beside a constant, then one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 16)

    def inner(self, x: Tensor) -> Tensor:
        return kept(lambda y: (self.b(y).relu(), torch.tensor([2.0]) * y.mean(1)), x)[0]

    def forward(self, x: Tensor) -> Tensor:
        y = kept(lambda y, scale: torch.relu(self.a(y)) * scale, x, 2.0)
        return self.c(kept(self.inner, y))


class Whole(nn.Module):
    """Everything is checkpointed, and the dropout beside it does nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 16))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layers, x, use_reentrant=False, preserve_rng_state=False)


def kept(call: Callable[..., Any], *args: Any) -> Any:
    return checkpoint(call, *args, use_reentrant=False)


@pytest.mark.parametrize("model, layers", [(Checkpointed(), 3), (Whole(), 2)], ids=["nested", "whole"])
def test_checkpointed_layers_prune_and_run_sparse(model: nn.Module, layers: int) -> None:
    model = pruned(integer_model(model), rows())
    assert len(fxprune.Pruner(model, rows(), sparsity=0.5).plan) == layers
    fast = compiled(model)
    assert_exact(run(fast.call, rows()), run(model, rows()))
    (context,) = fast.contexts
    assert sum(d.chosen for d in context.decisions) == layers
    seen = rewritten(model, rows())
    assert seen.ops["tag_activation_checkpoint"] == 0 and seen.ops["linear"] == 0


def test_in_training_the_checkpoint_stays() -> None:
    model, reference = (pruned(integer_model(Checkpointed()), rows()) for _ in range(2))
    fast = compiled(model)
    fast.call(rows()).sum().backward()
    reference(rows()).sum().backward()
    (context,) = fast.contexts
    assert [d.match.name for d in context.decisions if d.chosen] == ["c"]
    for given, expected in zip((model.a, model.b), (reference.a, reference.b), strict=True):
        assert_exact(given.weight.grad, expected.weight.grad, most_zeros=0.75)
