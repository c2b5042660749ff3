"""Each round of a Pruner: masks in the tiles of the kernels, the same by compiled operators as by their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fxprune.lowering.kernels import KernelTables
from torch import Tensor, nn

import fxprune
from fxprune.ops import plan_tiles

X = torch.randn(2, 64, 6, 6, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(64, 64, 5, groups=64, padding=2), nn.ReLU(), nn.Conv2d(64, 130, 1), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(130, 200))


def rounds(**options: Any) -> list[fxprune.plan.Plan]:
    """Train eight steps with a round every two; returns the plan after each round."""
    model = net()
    schedule = fxprune.LinearSchedule(0, 8, 2)
    pruner = fxprune.Pruner(model, X, sparsity=0.75, schedule=schedule, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    plans = []
    for _ in range(8):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
        if pruner.step():
            plans.append(pruner.plan)
    return plans


def test_every_round_has_the_tiles_of_the_kernels() -> None:
    """HSR is in every round: groups of channels and tiles are the kernel's, kept counts equal and in steps."""
    unit, plans = KernelTables().unit, rounds()
    assert len(plans) == 4
    for plan in plans:
        assert len(plan) == 3
        for layer in plan:
            assert layer.granularity == unit(layer.kind).granularity, layer.name
            if layer.kind == "depthwise":
                assert len(set(layer.counts)) == 1 and layer.counts[0] % 4 == 0, layer.counts


@pytest.mark.parametrize("importance", ["magnitude", "taylor", "l2", lambda name, weight: weight - 0.01])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_operators_choose_what_their_references_choose(importance: Any, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = rounds(importance=importance, scope=scope)
    for name in ("tile_scores", "keep_best", "held_scores", "shared_rows", "tile_counts", "zero_outside"):
        monkeypatch.setattr(torch.ops.fxprune, name, getattr(plan_tiles, name))
    for plan, expected in zip(found, rounds(importance=importance, scope=scope), strict=True):
        assert plan.to_dict() == expected.to_dict()
        for name, pruned in plan.weights.items():
            right: Tensor = expected.weights[name].mask
            assert torch.equal(pruned.mask, right), name
