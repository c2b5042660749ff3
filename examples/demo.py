"""Prune three models, compile them with ``backend="hwprune"``, prove the results equal, and time them.

    python examples/demo.py [--models mobilenetv2_100 efficientnet_b0 bert_6] [--rounds 15] [--layers]

Every engine runs the same pruned weights: stock ``torch.compile`` computes the masked dense model, with its defaults
and with Inductor's freezing. Weights are random, so this shows speed and equality, not accuracy; examples/digits.py
trains a model.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import torch
import zoo
from engines import compile_engine, relative_error

import fxprune
from fxprune.benchmark import interleave
from fxprune.report import Table

# what each model is asked to lose, and the layers that stay as they are
REQUESTS: dict[str, tuple[dict[str, float], tuple[str, ...]]] = {
    "mobilenetv2_100": ({"depthwise": 0.78, "pointwise": 0.50}, ()),
    "efficientnet_b0": ({"depthwise": 0.85, "pointwise": 0.62}, ()),
    "bert_6": ({"linear": 0.75}, ("pooler*",)),
    "bert_tiny": ({"linear": 0.75}, ("pooler*",)),
}
LABELS = {"bert_6": "BERT base, 6 of 12 layers, 128 tokens"}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["mobilenetv2_100", "efficientnet_b0", "bert_6"]
    parser.add_argument("--models", nargs="+", choices=list(REQUESTS), default=default)
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds of the timing")
    parser.add_argument("--layers", action="store_true", help="print the decision about every layer")
    args = parser.parse_args(argv)
    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    began = time.perf_counter()
    rows: list[tuple[Any, ...]] = []
    for name in args.models:
        rows += show(name, args.rounds, args.layers)
    head = ("model", "engine", "compile s", "median ms", "p10", "p90", "speed-up", "error")
    summary = {
        "batch": "1",
        "threads": torch.get_num_threads(),
        "speed-up": "over the fastest stock engine, which runs the same pruned weights",
        "error": "largest difference from an fp64 run of the masked dense model, relative to the largest output",
        "total": f"{time.perf_counter() - began:.0f} s",
    }
    print("\n" + str(Table("fp32, CPU", head, rows, summary)))
    return 0


def show(name: str, rounds: int, layers: bool) -> list[tuple[Any, ...]]:
    """Prune, compile, verify and time one model; returns its rows of the table."""
    label = LABELS.get(name, name)
    sparsity, ignored = REQUESTS[name]
    say(f"{label}: pruning to {sparsity}")
    model, inputs_of = zoo.build(name)
    inputs = inputs_of(1)
    result = fxprune.prune(model, inputs, sparsity=sparsity, ignored_layers=ignored)
    say("achieved " + ", ".join(f"{kind} {share:.1%}" for kind, share in result.sparsity.items() if kind != "all"))

    say("which layers run sparse kernels, measured against dense")
    explained = fxprune.explain(result.model, inputs)
    print(explained if layers else "\n".join(f"    {key}: {value}" for key, value in explained.summary.items()))

    engines: dict[str, Callable[..., Any]] = {}
    seconds: dict[str, float] = {}
    for engine in ("inductor", "inductor freezing", "fxprune"):
        say(f"compiling: {engine}")
        engines[engine], seconds[engine] = compile_engine(engine, result.model, inputs)

    say("verifying against fp64, and timing")
    fxprune.verify(result.model, inputs, compiled=engines["fxprune"])
    with torch.no_grad():
        exact = copy.deepcopy(result.model).double()(*(x.double() if x.is_floating_point() else x for x in inputs))
        errors = {engine: f"{relative_error(run(*inputs), exact):.1e}" for engine, run in engines.items()}
        samples = interleave({engine: lambda run=run: run(*inputs) for engine, run in engines.items()}, rounds, 40.0)
    medians = {engine: statistics.median(times) for engine, times in samples.items()}
    best = min(time for engine, time in medians.items() if engine != "fxprune")
    rows = []
    for engine, times in samples.items():
        ordered = sorted(times)
        low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
        rows.append(
            (
                label if engine == "inductor" else "",
                engine,
                f"{seconds[engine]:.0f}",
                f"{medians[engine]:.2f}",
                f"{low:.2f}",
                f"{high:.2f}",
                f"{best / medians[engine]:.2f}x",
                errors[engine],
            )
        )
    say(f"fxprune {best / medians['fxprune']:.2f}x of the fastest stock engine, equal to the masked dense model")
    return rows


def say(line: str) -> None:
    print(f"... {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
