"""How far the cost model is from the clock, on the distinct layers of whole models.

    python benchmarks/bench_cost.py [--cases mobilenetv2_100:1 bert_base:4 ...] [--json FILE]

Calibrates first, in this process and with private caches, so that both sides see the same machine. Each layer is timed
sparse at four shares of kept weights and dense in every layout, interleaved, the fastest call of each. The error of a kind
is the mean of |predicted / measured - 1|; the shapes of the calibration are others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import zoo
from fxprune.lowering import calibrate, measure
from fxprune.lowering.kernels import KernelTables

from fxprune.capture import capture, detect
from fxprune.config import Config
from fxprune.match import Match
from fxprune.planner import choose_masks

CASES = ("mobilenetv2_100:1", "efficientnet_b0:1", "bert_base:1", "mobilenetv2_100:8", "bert_base:4")
KEEPS = (1.0, 0.5, 0.38, 0.25)
_ROUNDS = 5


def layers(name: str, batch: int) -> list[Match]:
    """Return one match per distinct shape."""
    model, inputs = zoo.build(name)
    found: dict[str, Match] = {}
    for graph in capture(model, inputs(batch)):
        for match in detect(graph, Config()).matches:
            found.setdefault(f"{match.kind} {match.geometry} {match.matrix_shape}", match)
    return list(found.values())


def errors(match: Match, timer: measure.Measure) -> Iterator[dict[str, Any]]:
    """Yield a row per share of kept weights, and one for dense."""
    unit = KernelTables().unit
    x = torch.randn([int(s) for s in match.geometry.x])
    masks = [
        None if keep == 1.0 else choose_masks([match], Config(sparsity=1 - keep), unit)[match.parameter].layer
        for keep in KEEPS
    ]
    calls = [measure.sparse_call(match, mask, unit(match.kind), x) for mask in masks]
    with torch.inference_mode():
        micros, _ = measure.interleave([*calls, *measure.dense_calls(match, x)], _ROUNDS)
    dense = min(micros[len(masks) :])
    for what, predicted, measured in (
        *((f"{keep:.0%}", timer.predict(match, m).sparse, t) for keep, m, t in zip(KEEPS, masks, micros, strict=False)),
        ("dense", timer.predict(match, None).dense, dense),
    ):
        yield {
            "kind": match.kind,
            "shape": str(match.geometry),
            "kept": what,
            "predicted_us": round(predicted, 2),
            "measured_us": round(measured, 2),
            "error": round(predicted / measured - 1, 4),
        }


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return mean and largest absolute error and bias per kind, sparse and dense apart."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(f"{row['kind']} {'dense' if row['kept'] == 'dense' else 'sparse'}", []).append(row["error"])
        found.setdefault("all dense" if row["kept"] == "dense" else "all sparse", []).append(row["error"])
    return {
        kind: {
            "rows": len(values),
            "mean": round(statistics.mean(map(abs, values)), 4),
            "largest": max(map(abs, values)),
            "bias": round(statistics.mean(values), 4),
        }
        for kind, values in sorted(found.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=CASES, help="model:batch")
    parser.add_argument("--json", help="write rows and summary to this file")
    options = parser.parse_args()
    cases = {case: layers(case.partition(":")[0], int(case.partition(":")[2])) for case in options.cases}
    with tempfile.TemporaryDirectory() as folder:
        fitted = calibrate.calibrate(folder)
        timer = measure.Measure(Config(cache_dir=folder), KernelTables().unit)
        rows = [{"case": case, **row} for case, found in cases.items() for match in found for row in errors(match, timer)]
    print("fit: " + ", ".join(f"{name} {error:.1%}" for name, error in fitted.items()))
    for kind, numbers in summary(rows).items():
        print(f"{kind:18} {numbers['rows']:4} rows  mean {numbers['mean']:.1%}  bias {numbers['bias']:+.1%}")
    if options.json:
        data = {"threads": torch.get_num_threads(), "torch": torch.__version__, "fit": fitted}
        Path(options.json).write_text(json.dumps({**data, "summary": summary(rows), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
