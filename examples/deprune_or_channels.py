"""Depthwise pruning by DEPrune-BH against channel pruning at equal measured latency, on scikit-learn's digits.

    python examples/deprune_or_channels.py [--epochs 4] [--tune-epochs 3] [--steps 4]

Trains a small MobileNetV2, prunes it with DEPrune-BH (taps of the depthwise convolutions, channels of the 1x1 ones), and
measures the compiled result. Then searches the share of channels at which channel pruning alone is as fast, fine-tunes
both with their zeros held, and prints accuracy beside latency.
"""

from __future__ import annotations

import argparse
import copy
import logging
import statistics
import sys
from typing import Any

import digits
import torch
from torch import Tensor, nn

import fxprune
from fxprune.benchmark import interleave
from fxprune.report import Table

DEPRUNE = {
    "sparsity": {"depthwise": 0.78, "pointwise": 0.5},
    "pattern": {"pointwise": "channel"},
    "balance": True,
    "recalibration": "deprune",
}
MOST = 0.9


def channels(share: float) -> dict[str, Any]:
    return {"sparsity": {"pointwise": share}, "pattern": {"pointwise": "channel"}}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4, help="epochs of dense training")
    parser.add_argument("--tune-epochs", type=int, default=3, help="epochs of fine-tuning")
    parser.add_argument("--steps", type=int, default=4, help="halvings of the search")
    parser.add_argument("--rounds", type=int, default=12, help="interleaved rounds of each timing")
    args = parser.parse_args(argv)
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    train_set, test_set = digits.data()
    images = test_set[0][: digits.BATCH]

    net = digits.Net().to(memory_format=torch.channels_last)
    digits.train(net, torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=1e-2), train_set, args.epochs)

    deprune = fxprune.prune(net, images, **DEPRUNE)
    wanted, dense = latency(deprune.model, net, images, args.rounds)
    print(f"dense {dense:.2f} ms, DEPrune-BH {wanted:.2f} ms", flush=True)
    share = search(net, images, wanted, args.steps, args.rounds)
    cut = fxprune.prune(net, images, **channels(share))
    found, _ = latency(cut.model, net, images, args.rounds)

    rows = [("dense", "-", f"{dense:.2f}", f"{digits.accuracy(net, test_set):.1%}", "-")]
    for name, result, time in (("DEPrune-BH", deprune, wanted), ("channels", cut, found)):
        zeros = digits.percent(result.sparsity)
        before = digits.accuracy(result.model, test_set)
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(result.model.parameters(), 3e-3, weight_decay=1e-2)
        result.plan.hold(optimizer)
        digits.train(result.model, optimizer, train_set, args.tune_epochs)
        tuned = digits.accuracy(result.model, test_set)
        rows.append((name, zeros, f"{time:.2f}", f"{before:.1%}", f"{tuned:.1%}"))
    print(Table("at equal latency", ("pruning", "zeros", "ms", "accuracy", "fine-tuned"), rows, {"batch": digits.BATCH}))
    return 0


def search(net: nn.Module, images: Tensor, wanted: float, steps: int, rounds: int) -> float:
    """Return the smallest share of channels found to be as fast as ``wanted`` milliseconds, or the most that is tried."""
    low, high = 0.0, MOST
    for _ in range(steps):
        share = (low + high) / 2
        reached, _ = latency(fxprune.prune(net, images, **channels(share)).model, net, images, rounds)
        print(f"    {share:.0%} of the channels: {reached:.2f} ms", flush=True)
        low, high = (low, share) if reached <= wanted else (share, high)
    return high


def latency(model: nn.Module, dense: nn.Module, images: Tensor, rounds: int) -> tuple[float, float]:
    """Return the median milliseconds of the pruned model compiled by us and of the dense one by Inductor."""
    torch._dynamo.reset()
    calls: dict[str, Any] = {
        "pruned": torch.compile(copy.deepcopy(model).eval(), backend="hwprune"),
        "dense": torch.compile(copy.deepcopy(dense).eval()),
    }
    with torch.no_grad():
        times = interleave({name: lambda call=call: call(images) for name, call in calls.items()}, rounds, 20.0)
    return statistics.median(times["pruned"]), statistics.median(times["dense"])


if __name__ == "__main__":
    sys.exit(main())
