"""Prune without fine-tuning: what importance and one-shot compensation are worth on a trained net.

    python examples/compensation.py [--epochs 4] [--batches 4]

Trains the MobileNetV2 of digits.py once, prunes it by each importance with and without refitting the remaining weights
on a few calibration batches, and prints test accuracy and the error of the outputs on the test images.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from typing import Any

import torch
import torch.nn.functional as F
from digits import BATCH, Net, accuracy, data, train
from torch import Tensor, nn

import fxprune
from fxprune.report import Table

SPARSITIES = (0.5, 0.75, 0.85)
IMPORTANCES = ("magnitude", "wanda", "taylor")
MODES: tuple[bool | str, ...] = (False, True, "sequential")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4, help="epochs of dense training")
    parser.add_argument("--batches", type=int, default=4, help=f"calibration batches of {BATCH} training images")
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES, help="fractions of zeros")
    parser.add_argument("--importances", nargs="+", default=IMPORTANCES, help="also random, l2")
    args = parser.parse_args(argv)
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.manual_seed(0)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    train_set, test_set = data()
    model = Net()
    train(model, torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2), train_set, args.epochs)
    dense = outputs(model, test_set[0])
    calibration = list(zip(*(t[: args.batches * BATCH].split(BATCH) for t in train_set), strict=True))

    rows = []
    for sparsity in args.sparsities:
        for importance in args.importances:
            row: list[Any] = [f"{sparsity:.0%}", importance]
            for mode in MODES:
                result = fxprune.prune(
                    model,
                    test_set[0][:BATCH],
                    sparsity=sparsity,
                    importance=importance,
                    calibration=calibration,
                    loss_fn=F.cross_entropy,
                    compensate=mode,
                    ignored_layers=("classifier",),
                )
                error = ((outputs(result.model, test_set[0]) - dense).norm() / dense.norm()).item()
                row += [f"{accuracy(result.model, test_set):.1%}", f"{error:.1%}"]
            rows.append(tuple(row))
            print("    " + "  ".join(row), flush=True)
    head = ("zeros", "importance", "accuracy", "error", "refitted", "its error", "sequential", "its own error")
    summary = {
        "dense accuracy": f"{accuracy(model, test_set):.1%}",
        "calibration images": sum(len(y) for _, y in calibration),
    }
    print(Table("\npruned without fine-tuning", head, rows, summary))
    return 0


@torch.no_grad()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(BATCH)])


if __name__ == "__main__":
    sys.exit(main())
