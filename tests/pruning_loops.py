"""Networks, data and a training loop for the tests of ``fxprune.Pruner``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxprune import Pruner


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 8))


def convs(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.GELU(), nn.Conv2d(16, 16, 3, groups=16, padding=1))
    return nn.Sequential(*layers, nn.Conv2d(16, 32, 1), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8))


def rows(step: int = 0) -> Tensor:
    return torch.randn(16, 24, generator=torch.Generator().manual_seed(step))


def image(step: int = 0) -> Tensor:
    return torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(step))


def train(
    model: Any, optimizer: Any, pruner: Pruner | None, steps: range, data: Callable[[int], Tensor] = rows
) -> list[float]:
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = (model(data(step)) - 1).square().mean()
        loss.backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()
        losses.append(loss.item())
    return losses


def held(model: nn.Module, pruner: Pruner) -> dict[str, Tensor]:
    """Check that the weights are zero where the pruner says, and nowhere else by a lot; return the masks."""
    masks = pruner.state_dict()["masks"]
    parameters = dict(model.named_parameters())
    for name, mask in masks.items():
        assert not parameters[name][~mask].any() and (parameters[name][mask] != 0).float().mean() > 0.95, name
    return masks
