"""Train, prune, fine-tune, compile: a small MobileNetV2 on scikit-learn's handwritten digits, in about a minute.

    python examples/digits.py [--epochs 4] [--tune-epochs 3]

Prints accuracy after training, pruning and fine-tuning, then the compiled model's accuracy and speed beside stock
``torch.compile`` on the same pruned weights.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import fxprune
from fxprune.benchmark import interleave
from fxprune.report import Table

# expansion, channels, repeats and stride of each stage
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2), (6, 64, 2, 1))
BATCH = 64


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a convolution with BatchNorm and ReLU6."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True)]


class Block(nn.Module):
    """1x1 expand, 3x3 depthwise, 1x1 project, with a residual where shapes allow: x (B, C, H, W)."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int) -> None:
        super().__init__()
        wide = inputs * expansion
        expand = conv(inputs, wide, 1) if expansion > 1 else []
        depthwise = conv(wide, wide, 3, stride, groups=wide)
        self.body = nn.Sequential(*expand, *depthwise, nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + y if self.residual else y


class Net(nn.Module):
    """A MobileNetV2 for (B, 1, 32, 32) images and ten classes."""

    def __init__(self) -> None:
        super().__init__()
        layers, channels = conv(1, 16, 3), 16
        for expansion, outputs, repeats, stride in STAGES:
            for i in range(repeats):
                layers.append(Block(channels, outputs, expansion, stride if i == 0 else 1))
                channels = outputs
        self.features = nn.Sequential(*layers, *conv(channels, 256, 1))
        self.classifier = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4, help="epochs of dense training")
    parser.add_argument("--tune-epochs", type=int, default=3, help="epochs of fine-tuning with the zeros held")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of the timing")
    args = parser.parse_args(argv)
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    train_set, test_set = data()

    model = Net().to(memory_format=torch.channels_last)  # the faster layout for training
    train(model, torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2), train_set, args.epochs)
    print(f"trained           accuracy {accuracy(model, test_set):.1%}", flush=True)

    images = test_set[0][:BATCH]
    result = fxprune.prune(model, images, sparsity={"depthwise": 0.78, "pointwise": 0.50})
    pruned = result.model
    print(f"pruned            accuracy {accuracy(pruned, test_set):.1%}, sparsity {percent(result.sparsity)}", flush=True)

    optimizer = torch.optim.AdamW(pruned.parameters(), 3e-3, weight_decay=1e-2)
    handle = result.plan.hold(optimizer)
    train(pruned, optimizer, train_set, args.tune_epochs)
    handle.remove()
    print(f"fine-tuned        accuracy {accuracy(pruned, test_set):.1%}, zeros held", flush=True)

    engines: dict[str, Callable[..., Any]] = {
        "inductor": torch.compile(pruned),
        "fxprune": torch.compile(pruned, backend="hwprune"),
    }
    fxprune.verify(pruned, images, compiled=engines["fxprune"])
    print(f"compiled          accuracy {accuracy(engines['fxprune'], test_set):.1%}, verified against fp64", flush=True)
    pruned.eval()
    with torch.no_grad():
        samples = interleave({name: lambda run=run: run(images) for name, run in engines.items()}, args.rounds, 40.0)
    medians = {name: statistics.median(times) for name, times in samples.items()}
    rows = [(name, f"{time:.2f}", f"{medians['inductor'] / time:.2f}x") for name, time in medians.items()]
    summary = {"batch": BATCH, "threads": torch.get_num_threads()}
    print(Table("\nfp32, same pruned weights", ("engine", "ms", "speed-up"), rows, summary))
    return 0


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images, labels) to train on and to test on; images are (n, 1, 32, 32), normalised."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None]
    images = F.interpolate((images - images.mean()) / images.std(), size=(32, 32), mode="bilinear")
    labels = torch.tensor(digits.target)
    train_at, test_at = train_test_split(torch.arange(len(labels)).numpy(), test_size=0.25, random_state=0)
    return (images[train_at], labels[train_at]), (images[test_at], labels[test_at])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, samples: tuple[Tensor, Tensor], epochs: int) -> None:
    images, labels = samples
    model.train()
    steps = max(1, epochs * (len(labels) // BATCH))
    peak = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps + 1)
    for epoch in range(epochs):
        start, total = time.perf_counter(), 0.0
        for batch in torch.randperm(len(labels)).split(BATCH)[: len(labels) // BATCH]:
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        mean = total / max(1, len(labels) // BATCH)
        print(f"    epoch {epoch + 1} of {epochs}: loss {mean:.3f}, {time.perf_counter() - start:.1f} s", flush=True)
    model.eval()


@torch.no_grad()
def accuracy(model: Callable[..., Any], samples: tuple[Tensor, Tensor]) -> float:
    """Return the share of right answers, in batches of one size so that nothing is compiled twice."""
    images, labels = samples
    right = 0
    for start in range(0, len(labels), BATCH):
        batch = images[start : start + BATCH]
        padded = F.pad(batch, (0, 0, 0, 0, 0, 0, 0, BATCH - len(batch)))
        right += int((model(padded)[: len(batch)].argmax(1) == labels[start : start + BATCH]).sum())
    return right / len(labels)


def percent(sparsity: dict[str, float]) -> str:
    return ", ".join(f"{kind} {share:.1%}" for kind, share in sparsity.items() if kind != "all")


if __name__ == "__main__":
    sys.exit(main())
