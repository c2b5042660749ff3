"""Times whole training steps with pruned data gradients against stock Inductor, and each layer's data gradient.

    python benchmarks/bench_sdgp.py [--nets NAME ...] [--ratios auto:4:32 ...] [--rounds N] [--out FILE]

A step is forward, backward and SGD. Every ratio is a compile of its own of the same network, as is a second stock Inductor;
steps of all are interleaved in an order that is drawn anew for each round. The median over rounds of stock's time by the
other's is reported with a 95 % interval by bootstrap; that of stock by stock says what the machine makes of equal code.
The result is benchmarks/results/<machine>/sdgp.json; benchmarks/render_sdgp.py writes
docs/sdgp-results.md from it.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import RESULTS, machine, origin, own_environment

SAME = "stock again"
RATIOS = ("auto:2:4", "auto:2:8", "auto:4:32", "auto:1:16", "4:32")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--ratios", nargs="+", default=list(RATIOS))
    parser.add_argument("--rounds", type=int, default=20, help="interleaved steps of each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="the JSON file (default: results/<machine>/sdgp.json)")
    args = parser.parse_args(argv)
    own_environment()
    import torch

    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    record = {
        "threads": args.threads,
        "rounds": args.rounds,
        "rows": [row for net in args.nets for row in measured(net, args.ratios, args.rounds)],
        **origin(),
    }
    path = args.out or RESULTS / machine()["slug"] / "sdgp.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def transformer(width: int = 768, heads: int = 12, layers: int = 2, sequences: int = 8) -> tuple[Any, Any]:
    """Encoder layers, by default two as wide as BERT base, on sequences of 64 tokens."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.mix = (nn.Linear(width, width) for _ in range(4))
            self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])

        def forward(self, x: Any) -> Any:
            split = [part(x).unflatten(-1, (heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)]
            attended = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
            x = self.norms[0](x + self.mix(attended))
            return self.norms[1](x + self.narrow(F.gelu(self.wide(x))))

    return nn.Sequential(*[Layer() for _ in range(layers)]), torch.randn(sequences, 64, width)


def bottlenecks() -> tuple[Any, Any]:
    """Six of ResNet-50's blocks of 1x1, 3x3 and 1x1 convolutions, on eight maps of 256 x 28 x 28."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = ((256, 64, 1), (64, 64, 3), (64, 256, 1))
            parts = [(nn.Conv2d(i, o, k, padding=k // 2, bias=False), nn.BatchNorm2d(o)) for i, o, k in sizes]
            self.layers = nn.ModuleList([nn.Sequential(*part) for part in parts])

        def forward(self, x: Any) -> Any:
            y = x
            for i, layer in enumerate(self.layers):
                y = layer(y if i == 0 else y.relu())
            return (x + y).relu()

    return nn.Sequential(*[Block() for _ in range(6)]), torch.randn(8, 256, 28, 28)


def perceptron() -> tuple[Any, Any]:
    """Six linear layers of 1024 features, on 1024 rows."""
    import torch
    from torch import nn

    layers = [part for _ in range(6) for part in (nn.Linear(1024, 1024), nn.ReLU())]
    return nn.Sequential(*layers), torch.randn(1024, 1024)


NETS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "transformer": transformer,
    "bottlenecks": bottlenecks,
    "perceptron": perceptron,
}


def measured(net: str, ratios: list[str], rounds: int) -> list[dict[str, Any]]:
    """Return a row per ratio: milliseconds of a step, the ratio to stock's, and the layers."""
    import torch

    import fxprune

    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = NETS[net]()
    steps, layers = {"stock": step(model, x), SAME: step(model, x)}, {}
    for ratio in ratios:
        steps[ratio] = step(model, x, {"grad_sparsity": ratio})
        steps[ratio]()
        layers[ratio] = fxprune.gradient_report().to_dict()["rows"]
    for run in steps.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in steps}
    draw = random.Random(0)
    for _ in range(rounds):
        for name in draw.sample(list(steps), len(steps)):
            start = time.perf_counter()
            steps[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    gains = {name: [a / b for a, b in zip(times["stock"], taken, strict=True)] for name, taken in times.items()}
    same = interval(gains[SAME])
    print(f"{net:12} {SAME:10} {medians[SAME]:8.2f} ms, {same[0]:.3f} to {same[1]:.3f}", flush=True)
    rows = []
    for ratio in ratios:
        gain, (low, high) = statistics.median(gains[ratio]), interval(gains[ratio])
        print(f"{net:12} {ratio:10} {medians[ratio]:8.2f} ms, {gain:.3f}x, {low:.3f} to {high:.3f}", flush=True)
        times_of = {"stock ms": round(medians["stock"], 3), "ms": round(medians[ratio], 3), "speed-up": round(gain, 3)}
        spread = {"interval": [round(low, 3), round(high, 3)], "stock by stock": [round(v, 3) for v in same]}
        rows.append({"net": net, "ratio": ratio, "rounds": rounds, **times_of, **spread, "layers": layers[ratio]})
    return rows


def interval(values: list[float], draws: int = 4000) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median, by percentiles."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def step(model: Any, x: Any, options: dict[str, Any] | None = None) -> Callable[[], None]:
    """Return one training step of a copy of the network, compiled by Inductor or by us."""
    import torch

    import fxprune

    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    if options is None:
        call: Any = torch.compile(model)
    else:
        call = torch.compile(model, backend=fxprune.hwprune, options=options)
    upstream = torch.randn_like(model(x))

    def run() -> None:
        optimizer.zero_grad()
        call(x).backward(upstream)
        optimizer.step()

    return run


if __name__ == "__main__":
    sys.exit(main())
