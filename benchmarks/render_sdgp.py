"""Write docs/sdgp-results.md: accuracy and speed of training with pruned data gradients, and what a Pruner costs.

python benchmarks/render_sdgp.py

Reads benchmarks/results/*/sdgp-accuracy.json (``examples/sdgp_order.py --json``), sdgp.json (``bench_sdgp.py``) and
pruner.json (``bench_pruner.py``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from render_paper import newest, setting, table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
from sdgp_order import interval  # noqa: E402

PAGE = ROOT / "docs" / "sdgp-results.md"
PAPER = {"dense": "95.3", "random": "94.5", "magnitude": "95.2", "rescaled_magnitude": "95.2", "mvue": "-"}
RATIOS = {"4:8": "95.2", "2:8": "95.1", "4:32": "94.9", "2:4": "95.2"}  # rescaled magnitude, README of the authors' code
NETS = {"resnet9": "ResNet-9-style", "mobilenet": "MobileNetV2-style"}

TEXT_ACCURACY = """scikit-learn's digits, upscaled to 12 x 12 pixels: 1000 images to train, 797 to test. Test accuracy in
percent, mean and 95 % confidence interval over the seeds, which were fixed beforehand; in brackets the training loss of
the last epoch. The paper's column is its ResNet-9 on CIFAR-10 (arXiv 2202.00774, Table I, and the authors' README)."""
TEXT_SPEED = """One training step (forward, backward, SGD) compiled by us against stock Inductor on the same network,
interleaved in random order; the ratio is the median over the rounds, with its 95 % bootstrap interval. "stock by
stock" is that of a second compile by stock Inductor, the same code: what lies within it says nothing. With "auto" each
layer prunes only where pruning and a product that skips zeros were measured to be faster than the dense product by
`min_speedup`; `layers` counts them, of those that could have been pruned. Where none is pruned the programs are stock's,
letter for letter (`tests/backend/test_stock_programs.py`), and a ratio says what the machine does. The gain of a layer is
its data gradient's, pruning included."""
TEXT_PRUNER = """What `fxprune.Pruner` adds to a step (forward, backward, optimizer) in eager mode, at 75 % zeros: in most
steps it zeroes weights and two moments, or with a fused optimizer gradients alone; before a round Taylor scores are added
up, a round chooses masks. "amortised" is the share of the time without a pruner, with a round every {every} steps. The first
is a matter of memory, where zeros go and where Python finds weights and their state, so its share falls with the rows that
a step computes; it differs by half a percent of a step between runs. Bytes are those of the pruner's tensors before the
second round, scores included."""
LAYERS = {
    "perceptron": "The perceptron has layers of 1024 x 1024.",
    "transformer": "The transformer has those of BERT base.",
    "bottlenecks": "The bottlenecks are ResNet-50's.",
}


def main() -> int:
    PAGE.write_text(rendered())
    return 0


def rendered() -> str:
    """Return the page for the latest results."""
    found = {name: newest(f"{name}.json") for name in ("sdgp-accuracy", "sdgp", "pruner")}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        sys.exit(
            f"no {missing[0]}.json: run examples/sdgp_order.py, benchmarks/bench_sdgp.py and benchmarks/bench_pruner.py"
        )
    return page(*[json.loads(path.read_text()) for path in found.values() if path])


def page(accuracy: dict[str, Any], speed: dict[str, Any], pruner: dict[str, Any]) -> str:
    parts = [
        "# Training, measured: pruned data gradients and the Pruner",
        "Written by `benchmarks/render_sdgp.py`; do not edit.",
        "## Accuracy",
        TEXT_ACCURACY,
        f"{accuracy['epochs']} epochs, {accuracy['seeds']} seeds, torch {accuracy['torch']}, {accuracy['date']}.",
        accuracies(accuracy["results"]),
        order(accuracy["results"]),
        "![loss curves](sdgp-losses.svg)",
        "## Speed",
        "\n".join([TEXT_SPEED, *(LAYERS[net] for net in dict.fromkeys(row["net"] for row in speed["rows"]))]),
        f"Measured by `benchmarks/bench_sdgp.py` on {setting(speed)}.",
        speeds(speed["rows"]),
        "## The Pruner",
        TEXT_PRUNER.format(every=pruner["every"]),
        f"Measured by `benchmarks/bench_pruner.py` on {setting(pruner)}.",
        overheads(pruner["rows"]),
        equality(pruner["equality"]),
    ]
    return "\n\n".join(parts) + "\n"


def accuracies(results: list[dict[str, Any]]) -> str:
    nets = list(dict.fromkeys(r["net"] for r in results))
    found = {(r["net"], r["setting"]): r for r in results}
    lines = []
    for label in dict.fromkeys(r["setting"] for r in results):
        function, _, ratio = label.partition(" ")
        paper = PAPER[function] if ratio in ("", "2:4") else RATIOS[ratio] if function == "rescaled_magnitude" else "-"
        cells = []
        for net in nets:
            reached = found[net, label]["accuracy"]
            loss = mean(run[-1] for run in found[net, label]["losses"])
            cells.append(f"{mean(reached):.2f} ± {interval(reached):.2f} ({loss:.3f})")
        lines.append((label.replace("_", " "), paper, *cells))
    return table(("gradients", "paper", *[NETS[net] for net in nets]), lines)


def order(results: list[dict[str, Any]]) -> str:
    """Say which settings an interval tells from dense, by net."""
    lines = []
    for net in dict.fromkeys(r["net"] for r in results):
        spans = {r["setting"]: (mean(r["accuracy"]), interval(r["accuracy"])) for r in results if r["net"] == net}
        dense = spans.pop("dense")
        below = [label.replace("_", " ") for label, (m, h) in spans.items() if m + h < dense[0] - dense[1]]
        text = ", ".join(below) or "none"
        lines.append(f"- {NETS[net]}: intervals that lie below that of dense gradients: {text}.")
    return "\n".join(lines)


def speeds(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        timed = [layer for layer in row["layers"] if layer["dense us"] != "-"]
        pruned = [layer for layer in timed if layer["data gradient reads"] != "dense"]
        gains = sorted(float(layer["gain"]) for layer in timed)
        spread = f"{gains[0]:.2f} to {gains[-1]:.2f}" if gains else "-"
        times = (f"{row['stock ms']:.1f}", f"{row['ms']:.1f}", f"{row['speed-up']:.3f}x")
        ranges = [row.get(key) for key in ("interval", "stock by stock")]
        times += tuple("-" if r is None else f"{r[0]:.3f} to {r[1]:.3f}" for r in ranges)
        lines.append((row["net"], row["ratio"], *times, f"{len(pruned)}/{len(timed)}", spread))
    head = ("network", "grad_sparsity", "stock ms", "ms", "step ratio", "interval", "stock by stock")
    head += ("layers pruned", "gain of a layer")
    return table(head, lines)


def overheads(rows: list[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        times = (f"{row['other ms']:.1f}", f"{row['window ms']:.1f}", f"{row['round ms']:.1f}")
        share = f"{row['bytes'] / row['weights']:.2f}"
        lines.append(
            (
                row["net"],
                row["optimizer"],
                row["importance"],
                f"{row['step ms']:.1f}",
                *times,
                f"{row['overhead']:.1%}",
                share,
            )
        )
    head = (
        "network",
        "optimizer",
        "importance",
        "step ms",
        "+ ms",
        "+ ms before a round",
        "+ ms in a round",
        "amortised",
        "bytes / weights",
    )
    return table(head, lines)


def equality(found: dict[str, Any]) -> str:
    """Say what a resumed run and two processes leave of the weights of one run."""
    resumed, two = found["resumed"], found["two processes"]
    same = {True: "the same zeros", False: "other zeros"}
    return "\n".join(
        (
            f"A run that was saved halfway and resumed differs from one that was not by {resumed['largest difference']:g},",
            f"with {same[resumed['same zeros']]}. Two processes under DDP differ from one on whole batches by",
            f"{two['largest difference']:.1g}, the order of sums, with {same[two['same zeros']]}; the two from each other",
            f"by {two['between ranks']:g}.",
        )
    )


if __name__ == "__main__":
    sys.exit(main())
