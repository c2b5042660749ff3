"""Small models on integer data, so that a compiled model can be compared bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxprune
from tests.oracle import integer_model, integers


class Mobile(nn.Module):
    """Depthwise and 1x1 convolution with BatchNorm, global mean over 64 pixels, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.dw = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.act = nn.ReLU6()
        self.pw = nn.Conv2d(16, 32, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.fc = nn.Linear(32, 24)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.pw(self.act(self.bn1(self.dw(x)))))
        return self.fc(y.mean((2, 3)))


class OneOrBoth(nn.Module):
    """Two linear layers, of which the second runs only when asked."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, both: bool = True) -> Tensor:
        return self.a(x) + self.b(x) if both else self.a(x)


class Tied(nn.Module):
    """An embedding whose weight is the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle, self.head = nn.Embedding(48, 32), nn.Linear(32, 32), nn.Linear(32, 48, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.middle(self.embedding(tokens)))


def mobile(seed: int = 0) -> Mobile:
    return integer_model(Mobile(), seed)  # type: ignore[return-value]


def mlp(seed: int = 0) -> nn.Sequential:
    return integer_model(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)), seed)  # type: ignore[return-value]


def image(batch: int = 2, seed: int = 7) -> Tensor:
    return integers(batch, 16, 8, 8, seed=seed)


def rows(batch: int = 4, seed: int = 7) -> Tensor:
    return integers(batch, 32, seed=seed)


def pruned(model: nn.Module, *inputs: Any, sparsity: Any = 0.5, **options: Any) -> nn.Module:
    """Prune in place; the plan stays attached. No output feature goes, so that no channel is cut out of the graph."""
    return fxprune.prune(model, inputs, sparsity=sparsity, inplace=True, **{"columns": False, **options}).model


def run(call: Any, *inputs: Any) -> Any:
    with torch.no_grad():
        return call(*inputs)
