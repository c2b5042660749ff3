"""Never slower: ours beside stock Inductor at every share of zeros, with the lower 95 % bound of the ratio.

    python benchmarks/bench_sweep.py [--models mobilenetv2_100 ...] [--batches 1 32] [--out FOLDER]

All kinds of layers hold the same share of zeros (cases.LEVELS). Stock Inductor's time does not depend on zeros, so it is
compiled once, and each level takes turns with it alone: their bursts lie side by side, whatever the machine does meanwhile.
A bound comes from 2000 resamplings of the rounds' ratios. One JSON file per model and batch; benchmarks/render.py draws
them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_models import child, statistic, timed
from cases import LEVELS, MODELS, Case
from machine import ENVIRONMENT, RESULTS, machine, origin, own_environment

ROUNDS = 30  # of each level
FLOOR = 0.97  # what the lower bound of every ratio should reach
KINDS = ("depthwise", "pointwise", "conv", "linear")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batches", nargs="+", type=int, default=(1,))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--out", type=Path, help="folder of the JSON files (default: results/<machine>)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        own_environment()
        print(json.dumps(run(Case(**json.loads(args.worker)))))
        return 0
    folder = args.out or RESULTS / machine()["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    slower = failed = 0
    for model in args.models:
        for batch in args.batches:
            case = {"model": model, "batch": batch, "threads": args.threads, "rounds": args.rounds}
            record = child([__file__, "--worker", json.dumps(case)], {**os.environ, **ENVIRONMENT})
            if record is None:
                failed += 1
                continue
            (folder / f"sweep-{model}-b{batch}.json").write_text(json.dumps(record, indent=1) + "\n")
            for row in record["levels"]:
                slower += row["low"] < FLOOR
                times = f"{row['zeros']:4.0%} {row['ms']:9.3f} ms  {row['ratio']:.3f}x (at least {row['low']:.3f})"
                print(f"{model:24} b{batch:<3} {times}")
    print(f"{slower} cells below {FLOOR}, {failed} failed")
    return 1 if failed else 0


def run(case: Case) -> dict[str, Any]:
    """Return the row of every level, timed in this process."""
    import engines
    import torch
    import zoo
    from machine import Gate

    import fxprune

    torch.set_num_threads(case.threads)
    gate = Gate()
    model, inputs = zoo.prepared(case)
    engines.warm_up()
    stock = engines.compile_engine("inductor", model, inputs)[0]
    levels, stock_samples = [], []
    for level in LEVELS:
        sparsity = dict.fromkeys(KINDS, level)
        pruned = fxprune.prune(model, inputs, sparsity=sparsity, ignored_layers=case.ignored).model if level else model
        ours = engines.compile_engine(engines.OURS, pruned, inputs)[0]
        samples = timed({"inductor": stock, "ours": ours}, inputs, case.rounds, gate)
        stock_samples += samples["inductor"]
        ratios = [a / b for a, b in zip(samples["inductor"], samples["ours"], strict=True)]
        row = {"zeros": level, **statistic(samples["ours"]), "ratio": round(statistics.median(ratios), 4)}
        levels.append({**row, "low": round(lower_bound(ratios), 4)})
    return {
        **asdict(case),
        **origin(),
        "gate": {"repeated rounds": gate.disturbed, "gflops": round(gate.gflops(), 1)},
        "inductor": statistic(stock_samples),
        "levels": levels,
    }


def lower_bound(ratios: list[float], resamplings: int = 2000) -> float:
    """Return the lower end of the 95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(resamplings))
    return medians[int(0.025 * resamplings)]


if __name__ == "__main__":
    sys.exit(main())
