"""Whole models: ours against stock Inductor, ONNX Runtime and OpenVINO on the same weights, and on fewer channels.

    python benchmarks/bench_models.py [--quick] [--models mobilenetv2_100 ...] [--batches 1 32] [--out FOLDER]

Each case (benchmarks/cases.py) runs in a process of its own with empty compile and timing caches. Engines are timed in
interleaved rounds whose number is fixed beforehand; a round in which the processor was not ours alone is repeated
(machine.Gate). glibc's malloc is told to keep freed memory: by default it hands every large activation back to the
kernel, which slows dense PyTorch down and would flatter us. One JSON file per case goes to
benchmarks/results/<machine>/; benchmarks/render.py turns them into the table of README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cases import BATCHES, DTYPES, MODELS, Case, cases
from machine import ENVIRONMENT, RESULTS, ROOT, machine, origin, own_environment

BURST_MS = 60.0
PAUSE_MS = 30.0  # before each burst: the threads of the engine before it spin on for a while
QUICK = (Case("mobilenetv2_100", 1, rounds=5),)
TINY = (Case("bert_tiny", 1, rounds=2),)  # not part of the published set: a fast check of this file
Runs = dict[str, Callable[..., Any]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="MobileNetV2 at batch 1, few rounds")
    parser.add_argument("--models", nargs="+", default=MODELS, help="only these models")
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="of weights and images")
    parser.add_argument("--threads", nargs="+", type=int, default=(2, 1))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after this time")
    parser.add_argument("--out", type=Path, help="folder of the JSON files (default: results/<machine>)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        own_environment()
        print(json.dumps(run(Case(**json.loads(args.worker)))))
        return 0
    wanted = QUICK if args.quick else TINY if args.models == ["bert_tiny"] else None
    wanted = wanted or tuple(cases(args.models, args.batches, args.dtypes, args.threads))
    folder = args.out or (Path(tempfile.mkdtemp(prefix="fxprune-bench-")) if args.quick else RESULTS / machine()["slug"])
    folder.mkdir(parents=True, exist_ok=True)
    failed, start = 0, time.monotonic()
    for case in wanted:
        if time.monotonic() - start > 60 * args.minutes:
            print(f"... {case.name}: not started, the time is over")
            continue
        print(f"... {case.name}: compiling and {case.rounds} rounds", flush=True)
        record = in_processes(case)
        if record is None:
            failed += 1
            continue
        (folder / f"{case.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        show(record)
    print(f"results in {folder}")
    return 1 if failed else 0


def in_processes(case: Case) -> dict[str, Any] | None:
    """Time a case in one process, then compile each Inductor engine again in one of its own; ``None`` when it failed."""
    import engines

    with tempfile.TemporaryDirectory() as caches:
        folders = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/i", "XDG_CACHE_HOME": f"{caches}/x"}
        text = json.dumps(asdict(case))
        record = child([__file__, "--worker", text], {**os.environ, **ENVIRONMENT, **folders})
        if record is None:
            print(f"{case.name} failed")
            return None
        footprint = ROOT / "benchmarks" / "footprint.py"
        for name in ("inductor", engines.OURS, engines.EXPORTED):
            extra = child([str(footprint), text, name], {**os.environ, **folders})
            record["engines"].get(name, {}).update(extra or {})
    return record


def child(arguments: Sequence[str], environment: dict[str, str]) -> dict[str, Any] | None:
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        print(f"{done.stderr[-4000:]}\n{arguments[0]} ended with exit status {done.returncode}", flush=True)
        return None
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run(case: Case) -> dict[str, Any]:
    """Compile and time one case in this process."""
    import logging

    import channels
    import engines
    import torch
    import zoo
    from machine import Gate

    import fxprune
    from fxprune.decisions import LAST_REPORTS

    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(case.threads)
    gate = Gate()
    dense_model, inputs = zoo.prepared(case)
    result = fxprune.prune(dense_model, inputs, sparsity=case.sparsity, ignored_layers=case.ignored)
    engines.warm_up()
    runs: Runs = {}
    seconds: dict[str, float] = {}
    absent: dict[str, str] = {}
    sizes: dict[str, float] = {}

    def compiled(title: str, engine: str, model: Any) -> None:
        try:
            runs[title], seconds[title] = engines.compile_engine(engine, model, inputs, sizes)
        except Exception as error:  # a missing or failing runtime is a cell that cannot be compared
            if engine.startswith(engines.OURS) or engine in engines.STOCK:
                raise
            absent[title] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]

    for name in ("eager channels_last", *engines.STOCK):
        compiled(name, name, result.model)
    before = list(LAST_REPORTS)
    compiled(engines.OURS, engines.OURS, result.model)
    contexts = [c for c in LAST_REPORTS if not any(c is b for b in before)]
    peers = engines.peers(dense_model)
    for name in (*peers, engines.EXPORTED):
        compiled(name, name, result.model)
    with torch.no_grad():
        exact = engines.exact(result.model, inputs)
        errors = {name: engines.relative_error(call(*inputs), exact) for name, call in runs.items()}

    kept = channels.multiplications(result.model, inputs)
    smaller: dict[str, Any] = {"multiplications": kept}
    if not case.model.startswith("bert"):
        try:
            model = channels.channel_pruned(dense_model, inputs, kept)
            smaller["multiplications left"] = channels.multiplications(model, inputs)
            for name in (*peers, "inductor freezing"):
                compiled(f"channels: {name}", name, model)
        except (ImportError, ValueError) as error:
            absent["channels"] = f"{type(error).__name__}: {error}"[:200]

    samples = timed(runs, inputs, case.rounds, gate)
    unpruned = {n: engines.compile_engine(n, dense_model, inputs)[0] for n in ("inductor", engines.OURS)}
    plain = timed(unpruned, inputs, case.rounds, gate)
    return {
        **asdict(case),
        "sparsity": {k: round(v, 4) for k, v in result.sparsity.items() if k != "all"},
        **origin(),
        "environment": ENVIRONMENT,
        "gate": {"repeated rounds": gate.disturbed, "gflops": round(gate.gflops(), 1)},
        "engines": {
            name: {**statistic(values), "error": errors.get(name), "compile_s": round(seconds[name], 2)}
            for name, values in samples.items()
        },
        "artifact_mb": sizes,
        "channels": smaller,
        **speedups(samples, absent),
        "not_comparable": absent,
        "unpruned": {
            **{name: statistic(values) for name, values in plain.items()},
            "ratio": round(statistics.median(a / b for a, b in zip(plain["inductor"], plain[engines.OURS], strict=True)), 4),
        },
        "compile": compile_share(contexts, seconds[engines.OURS]),
        "matches": matches(contexts),
    }


def speedups(samples: dict[str, list[float]], absent: dict[str, str]) -> dict[str, Any]:
    """Return the ratios of medians to the fastest stock Inductor, dense runtime and channel-pruned runtime.

    A rival that is missing makes the ratio ``None``; against runtimes, the faster of our compiled and exported model counts.
    """
    import engines

    middle = {name: statistics.median(values) for name, values in samples.items()}
    ours = min(middle[name] for name in (engines.OURS, engines.EXPORTED) if name in middle)
    stock = min(engines.STOCK, key=middle.__getitem__)
    found: dict[str, Any] = {"fastest_stock": stock, "speedup": round(middle[stock] / middle[engines.OURS], 3)}
    for title in ("dense", "channels"):
        names = [n for n in middle if not n.startswith(engines.OURS) and n.startswith("channels") == (title == "channels")]
        missing = [n for n in absent if n.startswith("channels") == (title == "channels")]
        if names:
            fastest = min(names, key=middle.__getitem__)
            found[f"fastest_{title}"] = fastest
            found[f"speedup_over_{title}"] = None if missing else round(middle[fastest] / ours, 3)
    return found


def timed(runs: Runs, inputs: Any, rounds: int, gate: Callable[[], bool]) -> dict[str, list[float]]:
    import torch

    from fxprune.benchmark import interleave

    with torch.no_grad():
        calls = {name: lambda call=call: call(*inputs) for name, call in runs.items()}
        return interleave(calls, rounds, BURST_MS, PAUSE_MS, gate)


def statistic(samples: list[float]) -> dict[str, float]:
    from fxprune.benchmark import quantile

    values = {"ms": statistics.median(samples), "p10": quantile(samples, 0.1), "p90": quantile(samples, 0.9)}
    return {name: round(value, 4) for name, value in values.items()}


def compile_share(contexts: list[Any], total: float) -> dict[str, float]:
    """Seconds of planning, packing and measuring (measuring is part of planning), and their share of the compile."""
    own = sum(s for c in contexts for name, s in c.seconds.items() if name not in ("codegen", "measure"))
    measure = sum(c.seconds.get("measure", 0.0) for c in contexts)
    return {
        "own_s": round(own, 3),
        "measure_s": round(measure, 3),
        "total_s": round(total, 3),
        "share": round(own / total, 4),
    }


def matches(contexts: list[Any]) -> dict[str, dict[str, int]]:
    """Matches per kind: how many there are, hold zeros, and run our kernels; and depthwise-separable blocks."""
    counts: dict[str, dict[str, int]] = {}
    for context in contexts:
        for decision in context.decisions:
            entry = counts.setdefault(decision.match.kind, {"found": 0, "pruned": 0, "sparse": 0})
            entry["found"] += 1
            entry["pruned"] += decision.mask is not None
            entry["sparse"] += decision.chosen
        blocks = counts.setdefault("blocks", {"found": 0})
        blocks["found"] += len(context.blocks)
    return counts


def show(record: dict[str, Any]) -> None:
    for name, row in record["engines"].items():
        error = "" if row["error"] is None else f"  error {row['error']:.1e}"
        memory = f"  peak {row['peak_mb']:.0f} MB, warm compile {row['warm_compile_s']:.1f} s" if "peak_mb" in row else ""
        print(f"    {name:32}{row['ms']:10.3f} ms  (p10 {row['p10']:.3f}, p90 {row['p90']:.3f}){error}{memory}")
    for name, reason in record["not_comparable"].items():
        print(f"    {name:32}not comparable: {reason}")
    over, fewer = record.get("speedup_over_dense"), record.get("speedup_over_channels")
    print(f"    {'not comparable with' if over is None else f'{over:.2f}x of'} the fastest dense runtime", end="; ")
    print(f"{'not comparable with' if fewer is None else f'{fewer:.2f}x of'} fewer channels", end="; ")
    print(f"{record['speedup']:.2f}x of {record['fastest_stock']}; unpruned {record['unpruned']['ratio']:.3f}x of stock")


if __name__ == "__main__":
    sys.exit(main())
