"""Patterns against each other on one net: accuracy on digits at equal measured latency, and at equal sparsity.

    python benchmarks/bench_patterns.py [--seeds 3] [--speedup 1.4]

The small MobileNetV2 of examples/digits.py is trained per seed. For each pattern the share of zeros in the 1x1 convolutions
is searched, on the first seed, until the compiled net is as fast as asked (beside stock Inductor on the dense net,
interleaved); then every seed is pruned so, fine-tuned with the zeros held, and tested. Pruned at one sparsity (50 %) without
fine-tuning, the same nets also give accuracy and retained importance (the share of the squared weights that stays).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import RESULTS, machine, origin, own_environment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
EPOCHS, TUNE_EPOCHS, ROUNDS, STEPS = 4, 2, 12, 4
DEPTHWISE = 0.78


@dataclass(frozen=True)
class Method:
    """One row: the pattern of the 1x1 convolutions, DEPrune's variant of the depthwise ones, or none."""

    name: str
    pattern: str
    depthwise: dict[str, Any] | None = None
    fixed: float | None = None
    least: float = 0.0  # sparsity the pattern cannot go below
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self, share: float) -> dict[str, Any]:
        sparsity = {"pointwise": self.fixed or share}
        options = {**self.options, **(self.depthwise or {})}
        if self.depthwise is not None:
            sparsity["depthwise"] = DEPTHWISE
        return {"sparsity": sparsity, "pattern": {"pointwise": self.pattern}, **options}


DCP, DCP_B, DCP_BH = (
    {"balance": False, "recalibration": "off"},
    {"balance": True, "recalibration": "off"},
    {"balance": True, "recalibration": "deprune"},
)
METHODS = (
    Method("channel pruning", "channel"),
    Method("DEPrune (DCP + channel)", "channel", DCP),
    Method("DEPrune-B", "channel", DCP_B),
    Method("DEPrune-BH", "channel", DCP_BH),
    Method("TW", "tile"),
    Method("TEW", "tew"),
    Method("TVW", "tvw", least=0.5),
    Method("2:4", "2:4", fixed=0.5),
    Method("block 8x8 (BW)", "block:8x8"),
    Method("unstructured (EW)", "unstructured"),
    Method("DCP-BH + TW", "tile", DCP_BH),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--speedup", type=float, default=1.4, help="over stock Inductor on the dense net")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--only", nargs="+", help="names of methods")
    parser.add_argument("--out", type=Path, help="the JSON file (default: results/<machine>/patterns.json)")
    args = parser.parse_args(argv)
    own_environment()
    import torch

    torch.set_num_threads(2)
    nets = [trained(seed, args.epochs) for seed in range(args.seeds)]
    print("dense accuracy", [f"{accuracy(net):.1%}" for net in nets], flush=True)
    methods = [m for m in METHODS if not args.only or m.name in args.only]
    rows = [row(method, nets, args.speedup) for method in methods]
    record = {
        "model": "MobileNetV2 for digits",
        "batch": 64,
        "threads": 2,
        "speedup asked": args.speedup,
        "seeds": args.seeds,
        "epochs": [args.epochs, TUNE_EPOCHS],
        "dense accuracy": [round(accuracy(net), 4) for net in nets],
        "rows": rows,
        **origin(),
    }
    path = args.out or RESULTS / machine()["slug"] / "patterns.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def row(method: Method, nets: list[Any], wanted: float) -> dict[str, Any]:
    share, reached = search(method, nets[0], wanted)
    tuned, cut, kept = [], [], []
    for seed, net in enumerate(nets):
        result = pruned(method, net, share)
        tuned.append(fine_tuned(result, seed))
        at_half = pruned(method, net, 0.5)
        cut.append(accuracy(at_half.model))
        kept.append(retained(net, at_half.model))
    made = {
        "method": method.name,
        "pointwise": round(method.fixed or share, 3),
        "sparsity": {k: round(v, 3) for k, v in result.sparsity.items()},
        "speedup": round(reached, 3),
        "accuracy": [round(a, 4) for a in tuned],
        "mean": round(statistics.mean(tuned), 4),
        "deviation": round(statistics.stdev(tuned), 4) if len(tuned) > 1 else None,
        "at 50% without fine-tuning": round(statistics.mean(cut), 4),
        "retained importance at 50%": round(statistics.mean(kept), 4),
    }
    print(made, flush=True)
    return made


def search(method: Method, net: Any, wanted: float) -> tuple[float, float]:
    """Return the smallest share of zeros that is as fast as asked and its speed-up; the largest tried when none is."""
    if method.fixed is not None:
        return method.fixed, speedup(method, net, method.fixed)
    low, high = method.least, 0.9
    best = (high, 0.0)
    for step in range(STEPS):
        share = 0.9 if step == 0 else (low + high) / 2
        reached = speedup(method, net, share)
        if reached >= wanted:
            high, best = share, (share, reached)
        elif step == 0:
            return share, reached
        else:
            low = share
    return best


def speedup(method: Method, net: Any, share: float) -> float:
    import digits
    import torch

    from fxprune.benchmark import interleave

    images = digits.data()[1][0][: digits.BATCH]
    model = pruned(method, net, share).model.eval()
    torch._dynamo.reset()
    runs = {"dense": torch.compile(copy.deepcopy(net)), "ours": torch.compile(model, backend="hwprune")}
    with torch.no_grad():
        times = interleave({name: lambda run=run: run(images) for name, run in runs.items()}, ROUNDS, 40.0)
    return statistics.median(times["dense"]) / statistics.median(times["ours"])


def pruned(method: Method, net: Any, share: float) -> Any:
    import digits

    import fxprune

    return fxprune.prune(net, digits.data()[1][0][: digits.BATCH], **method.arguments(share))


def fine_tuned(result: Any, seed: int) -> float:
    import digits
    import torch

    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(result.model.parameters(), 3e-3, weight_decay=1e-2)
    result.plan.hold(optimizer)
    digits.train(result.model, optimizer, digits.data()[0], TUNE_EPOCHS)
    return accuracy(result.model)


def trained(seed: int, epochs: int) -> Any:
    import digits
    import torch

    torch.manual_seed(seed)
    net = digits.Net().to(memory_format=torch.channels_last)
    digits.train(net, torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=1e-2), digits.data()[0], epochs)
    return net


def accuracy(model: Any) -> float:
    import digits

    model.eval()
    return digits.accuracy(model, digits.data()[1])


def retained(dense: Any, sparse: Any) -> float:
    """Return the share of the squared weights of all pruned layers that is left."""
    pairs = [(a, b) for a, b in zip(dense.parameters(), sparse.parameters(), strict=True) if a.dim() == 4 and (b == 0).any()]
    return sum(b.square().sum().item() for _, b in pairs) / max(sum(a.square().sum().item() for a, _ in pairs), 1e-30)


if __name__ == "__main__":
    sys.exit(main())
