"""Prune a small transformer tile by tile while it trains, by Taylor importance, on scikit-learn's digits.

    python examples/gradual_transformer.py [--epochs 25] [--sparsity 0.75]

Trains the same network three times for as many epochs: dense, pruned gradually along a cubic schedule, and pruned at once
halfway. Prints the accuracy of each, its zeros, and what the gradually pruned one gains when compiled.
"""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxprune
from fxprune.report import Table

TRAIN, BATCH, WIDTH, HEADS, LAYERS = 1200, 50, 128, 4, 2


class Layer(nn.Module):
    """Attention and a feed-forward network, each behind a norm: x (B, T, WIDTH)."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH) for _ in range(2)])
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*heads.unbind(0))
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Encoder(nn.Module):
    """A transformer over the 16 patches of 2 x 2 pixels of a digit: x (B, 8, 8) -> (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.place = nn.Parameter(torch.zeros(16, WIDTH))
        self.layers = nn.Sequential(*[Layer() for _ in range(LAYERS)])
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.unfold(1, 2, 2).unfold(2, 2, 2).flatten(3).flatten(1, 2)
        return self.head(self.layers(self.embed(patches) + self.place).mean(1))


def data() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(digits.images, dtype=torch.float32)[order] / 8 - 1
    return images, torch.tensor(digits.target)[order]


def train(schedule: Any, sparsity: float, epochs: int) -> tuple[nn.Module, Any, float]:
    """Train with a schedule of pruning, or dense; return the model, the result of pruning and the test accuracy."""
    torch.manual_seed(0)
    images, classes = data()
    model = Encoder()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=1e-2)
    steps = epochs * (TRAIN // BATCH)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    pruner = None
    if schedule is not None:
        layers = {"layers*": sparsity}  # embedding and head stay dense
        pruner = fxprune.Pruner(model, images[:BATCH], sparsity=layers, schedule=schedule, importance="taylor")
    for _ in range(epochs):
        for part in torch.randperm(TRAIN).split(BATCH):
            F.cross_entropy(model(images[part]), classes[part]).backward()
            optimizer.step()
            rates.step()
            if pruner is not None:
                pruner.step()
            optimizer.zero_grad()
    result = None if pruner is None else pruner.finalize()
    model.eval()
    with torch.no_grad():
        right = (model(images[TRAIN:]).argmax(1) == classes[TRAIN:]).float().mean().item()
    return model, result, right


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--sparsity", type=float, default=0.75, help="of the encoder's linear layers")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of the timing")
    args = parser.parse_args(argv)
    logging.getLogger("torch").setLevel(logging.ERROR)
    steps = args.epochs * (TRAIN // BATCH)
    begin, end = steps // 8, steps * 5 // 8
    schedules = {
        "dense": None,
        "gradual": fxprune.CubicSchedule(begin, end, max(1, (end - begin) // 8)),
        "at once": fxprune.OneShotSchedule(steps // 2),
    }
    rows, models = [], {}
    for name, schedule in schedules.items():
        models[name], result, right = train(schedule, args.sparsity, args.epochs)
        rows.append((name, "-" if result is None else f"{result.sparsity['linear']:.1%}", f"{right:.1%}"))
        print(f"{name:8} accuracy {right:.1%}", flush=True)
    print(Table("digits", ("pruning", "zeros of linear layers", "test accuracy"), rows))
    images = data()[0][:BATCH]
    fxprune.verify(models["gradual"], images)
    print(fxprune.benchmark(models["gradual"], images, rounds=args.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
