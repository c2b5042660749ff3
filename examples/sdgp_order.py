"""Does SDGP's order hold? Two small networks on scikit-learn's digits, dense and with pruned data gradients, five seeds.

    python examples/sdgp_order.py [--nets resnet9 mobilenet] [--epochs 4] [--seeds 5] [--json FILE] [--plot FILE]

Trains a ResNet-9-style and a MobileNetV2-style network (digits upscaled to 12 x 12 pixels) with dense gradients and with
each pruning function at each n:m, and prints test accuracy as mean and 95 % confidence interval over the seeds, fixed
beforehand. The paper's order on CIFAR-10 is dense 95.3, rescaled magnitude 95.2, magnitude 95.2, random 94.5 (arXiv
2202.00774, Table I).
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fxprune
from fxprune.report import Table

FUNCTIONS = ("random", "magnitude", "rescaled_magnitude", "mvue")
RATIOS = ("2:4", "4:8", "2:8", "4:32")
TRAIN, BATCH, SIDE = 1000, 50, 12
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # two-sided 95 % quantile by number of seeds


def block(inputs: int, outputs: int, pool: bool = False) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.MaxPool2d(2)] if pool else []))


class Residual(nn.Module):
    """x + body(x), x: (B, C, H, W)."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def resnet9() -> nn.Module:
    """Eight convolutions and a linear layer, in the order of the paper's CIFAR-10 network."""
    residual = (Residual(block(32, 32), block(32, 32)), Residual(block(64, 64), block(64, 64)))
    head = (nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return nn.Sequential(block(1, 32), block(32, 32, True), residual[0], block(32, 64, True), residual[1], *head)


def inverted(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    wide = 4 * inputs
    layers = [nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
    layers += [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6()]
    layers += [nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
    return Residual(*layers) if stride == 1 and inputs == outputs else nn.Sequential(*layers)


def mobilenet() -> nn.Module:
    body = (inverted(16, 24, 2), inverted(24, 24), inverted(24, 32, 2), inverted(32, 32))
    return nn.Sequential(block(1, 16), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


NETS: dict[str, Callable[[], nn.Module]] = {"resnet9": resnet9, "mobilenet": mobilenet}


def digits() -> tuple[Tensor, Tensor]:
    """Return (1797, 1, SIDE, SIDE) images and their classes, in a fixed random order."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return images[order], torch.tensor(data.target)[order]


def train(model: nn.Module, call: Any, data: tuple[Tensor, Tensor], epochs: int, seed: int) -> tuple[float, list[float]]:
    """Train with one seed; return test accuracy in percent and the mean loss of each epoch."""
    images, classes = data
    torch.manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    fxprune.gradient_clock.load_state_dict({"step": 0, "call": 0})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (TRAIN // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    losses = []
    model.train()
    for _ in range(epochs):
        total = 0.0
        for part in torch.randperm(TRAIN).split(BATCH):
            loss = F.cross_entropy(call(images[part]), classes[part], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        losses.append(total / (TRAIN // BATCH))
    model.eval()
    with torch.no_grad():
        right = (model(images[TRAIN:]).argmax(1) == classes[TRAIN:]).float().mean().item()
    return 100 * right, losses


def settings(functions: list[str], ratios: list[str]) -> list[tuple[str, dict[str, str]]]:
    """Return a label and the options of each way to train."""
    pruned = [(f"{f} {r}", {"grad_sparsity": r, "grad_pruning": f}) for r in ratios for f in functions]
    return [("dense", {}), *pruned]


def interval(values: list[float]) -> float:
    """Return half the width of the 95 % confidence interval of the mean."""
    return STUDENT[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) in STUDENT else 0.0


def table(results: list[dict[str, Any]]) -> Table:
    nets = list(dict.fromkeys(r["net"] for r in results))
    labels = list(dict.fromkeys(r["setting"] for r in results))
    rows = []
    for label in labels:
        cells = []
        for net in nets:
            values = [a for r in results if (r["net"], r["setting"]) == (net, label) for a in r["accuracy"]]
            losses = [run[-1] for r in results if (r["net"], r["setting"]) == (net, label) for run in r["losses"]]
            cells += [f"{statistics.mean(values):.2f} ± {interval(values):.2f}", f"{statistics.mean(losses):.4f}"]
        rows.append((label, *cells))
    head = tuple(name for net in nets for name in (f"{net} accuracy %", "last loss"))
    return Table("test accuracy, mean and 95 % interval over the seeds", ("gradients", *head), rows)


def plot(results: list[dict[str, Any]], path: str) -> None:
    """Draw the mean loss of each epoch; needs matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    nets = list(dict.fromkeys(r["net"] for r in results))
    figure, axes = pyplot.subplots(1, len(nets), figsize=(7 * len(nets), 5), squeeze=False)
    for axis, net in zip(axes[0], nets, strict=True):
        for r in [r for r in results if r["net"] == net]:
            mean = [statistics.mean(epoch) for epoch in zip(*r["losses"], strict=True)]
            axis.plot(range(1, len(mean) + 1), mean, label=r["setting"], linewidth=3 if r["setting"] == "dense" else 1)
        axis.set(title=net, xlabel="epoch", ylabel="training loss")
        axis.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--functions", nargs="+", choices=FUNCTIONS, default=list(FUNCTIONS))
    parser.add_argument("--ratios", nargs="+", default=list(RATIOS), help="n:m to train with")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0, 1, ... of every setting")
    parser.add_argument("--json", help="write accuracies and losses to this file")
    parser.add_argument("--plot", help="draw the loss curves into this file")
    args = parser.parse_args(argv)
    logging.getLogger("torch").setLevel(logging.ERROR)
    data, results = digits(), []
    for net in args.nets:
        for label, options in settings(args.functions, args.ratios):
            torch._dynamo.reset()
            model = NETS[net]()
            call = torch.compile(model, backend=fxprune.hwprune, options={"fallback": "eager", **options})
            start = time.perf_counter()
            runs = [train(model, call, data, args.epochs, seed) for seed in range(args.seeds)]
            accuracy = [run[0] for run in runs]
            results.append({"net": net, "setting": label, "accuracy": accuracy, "losses": [run[1] for run in runs]})
            mean = f"{statistics.mean(accuracy):6.2f} ± {interval(accuracy):.2f} %"
            print(f"{net:10} {label:24} {mean}  {time.perf_counter() - start:.1f} s", flush=True)
            if args.json:
                report = {"epochs": args.epochs, "seeds": args.seeds, "torch": torch.__version__, "results": results}
                Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    print(table(results))
    if args.plot:
        plot(results, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
