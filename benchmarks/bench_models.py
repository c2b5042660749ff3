"""Whole models: ours against stock Inductor, ONNX Runtime and OpenVINO on the same pruned weights, and on unpruned ones.

    python benchmarks/bench_models.py [--quick] [--models mobilenetv2_100 ...] [--dtype bfloat16] [--out FOLDER]

Each model and batch runs in a process of its own with empty compile and timing caches. Engines are timed in interleaved
rounds whose number is fixed beforehand. glibc's malloc is told to keep freed memory: by default it hands every large
activation back to the kernel, which slows dense PyTorch down and would flatter us. One JSON file per case goes to
benchmarks/results/<machine>/; benchmarks/render.py turns them into the table of README.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# never map large blocks, never trim: freed memory is reused
ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}
BURST_MS = 60.0
PAUSE_MS = 30.0  # before each burst: the threads of the engine before it spin on for a while


@dataclass(frozen=True)
class Case:
    """One model and batch, and the number of rounds it is timed in."""

    model: str
    batch: int
    sparsity: dict[str, float]
    rounds: int
    ignored: tuple[str, ...] = ()
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{self.model}-b{self.batch}" + ("" if self.dtype == "float32" else f"-{self.dtype}")


_MOBILE = {"depthwise": 0.78, "pointwise": 0.50}
_EFFICIENT = {"depthwise": 0.85, "pointwise": 0.62}
CASES = (
    Case("mobilenetv2_100", 1, _MOBILE, 40),
    Case("mobilenetv2_100", 32, _MOBILE, 20),
    Case("efficientnet_b0", 1, _EFFICIENT, 40),
    Case("efficientnet_b0", 32, _EFFICIENT, 20),
    Case("bert_base", 1, {"linear": 0.75}, 30, ("pooler*",)),
    Case("bert_base", 8, {"linear": 0.75}, 15, ("pooler*",)),
)
BFLOAT16 = tuple(replace(case, dtype="bfloat16") for case in CASES)
QUICK = (Case("mobilenetv2_100", 1, _MOBILE, 5),)
# not part of the published set; a fast check of this file
TINY = (Case("bert_tiny", 1, {"linear": 0.75}, 2, ("pooler*",)),)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="MobileNetV2 at batch 1, few rounds")
    parser.add_argument("--models", nargs="+", help="only these models")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of weights and images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder of the JSON files (default: results/<machine>)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        case = next(c for c in (*QUICK, *CASES, *TINY, *BFLOAT16) if args.worker == f"{c.name}:{c.rounds}")
        print(json.dumps(run(case, args.threads)))
        return 0
    cases = QUICK if args.quick else (*CASES, *TINY) if args.models else CASES
    cases = BFLOAT16 if args.dtype == "bfloat16" else cases
    cases = tuple(c for c in cases if not args.models or c.model in args.models)
    folder = args.out or (Path(tempfile.mkdtemp(prefix="fxprune-bench-")) if args.quick else RESULTS / machine()["slug"])
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for case in cases:
        print(f"... {case.name}: compiling and {case.rounds} rounds", flush=True)
        with tempfile.TemporaryDirectory() as caches:
            done = subprocess.run(
                [sys.executable, __file__, "--worker", f"{case.name}:{case.rounds}", "--threads", str(args.threads)],
                env={**os.environ, **ENVIRONMENT, "TORCHINDUCTOR_CACHE_DIR": f"{caches}/i", "XDG_CACHE_HOME": f"{caches}/x"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
            )
        if done.returncode:
            failed += 1
            print(f"{done.stderr[-4000:]}\n{case.name} failed with exit status {done.returncode}", flush=True)
            continue
        record = {**json.loads(done.stdout.splitlines()[-1]), "date": f"{datetime.date.today()}", "commit": commit()}
        (folder / f"{case.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        show(record)
    print(f"results in {folder}")
    return 1 if failed else 0


def run(case: Case, threads: int) -> dict[str, Any]:
    """Compile and time one case in this process."""
    for name, value in ENVIRONMENT.items():
        if os.environ.get(name) != value:  # read when the process starts
            os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    import logging

    import engines
    import peers
    import torch
    import zoo

    import fxprune
    from fxprune.backend import LAST_REPORTS

    logging.getLogger("torch").setLevel(logging.ERROR)
    torch.set_num_threads(threads)
    load = [round(os.getloadavg()[0], 2)]
    dense_model, inputs_of = zoo.build(case.model)
    inputs, dtype = inputs_of(case.batch), getattr(torch, case.dtype)
    dense_model = dense_model.to(dtype)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    result = fxprune.prune(dense_model, inputs, sparsity=case.sparsity, ignored_layers=case.ignored)
    warm_up(torch)

    runs: dict[str, Callable[..., Any]] = {}
    seconds: dict[str, float] = {}
    for name in ("eager channels_last", *engines.STOCK):
        runs[name], seconds[name] = engines.compile_engine(name, result.model, inputs)
    before = list(LAST_REPORTS)
    runs[engines.OURS], seconds[engines.OURS] = engines.compile_engine(engines.OURS, result.model, inputs)
    contexts = [c for c in LAST_REPORTS if not any(c is b for b in before)]
    absent = {}
    for name in (*peers.peers(next(dense_model.parameters()).dtype), engines.EXPORTED):
        try:
            runs[name], seconds[name] = engines.compile_engine(name, result.model, inputs)
        except Exception as error:  # a missing or failing runtime is a cell that cannot be compared
            absent[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]

    with torch.no_grad():
        exact = copy_double(result.model)(*(x.double() if x.is_floating_point() else x for x in inputs))
        errors = {name: engines.relative_error(call(*inputs), exact) for name, call in runs.items()}
    samples = timed(runs, inputs, case.rounds)
    stock = min(engines.STOCK, key=lambda name: statistics.median(samples[name]))
    ours = min(statistics.median(samples[name]) for name in (engines.OURS, engines.EXPORTED) if name in samples)
    dense = {name: statistics.median(samples[name]) for name in samples if not name.startswith(engines.OURS)}
    fastest = min(dense, key=lambda name: dense[name])

    torch._dynamo.reset()  # else both models share compiled graphs
    unpruned = {n: engines.compile_engine(n, dense_model, inputs)[0] for n in ("inductor", engines.OURS)}
    plain = timed(unpruned, inputs, case.rounds)
    return {
        "model": case.model,
        "batch": case.batch,
        "dtype": case.dtype,
        "threads": threads,
        "rounds": case.rounds,
        "sparsity": {k: round(v, 4) for k, v in result.sparsity.items() if k != "all"},
        "machine": machine(),
        "versions": versions(),
        "environment": ENVIRONMENT,
        "load": [*load, round(os.getloadavg()[0], 2)],
        "engines": {
            name: {**statistic(samples[name]), "error": errors[name], "compile_s": round(seconds[name], 2)} for name in runs
        },
        "fastest_stock": stock,
        "speedup": round(statistics.median(samples[stock]) / statistics.median(samples[engines.OURS]), 3),
        "fastest_dense": fastest,
        "speedup_over_dense": None if absent else round(dense[fastest] / ours, 3),
        "not_comparable": absent,
        "unpruned": {
            **{name: statistic(values) for name, values in plain.items()},
            "ratio": round(statistics.median(a / b for a, b in zip(plain["inductor"], plain[engines.OURS], strict=True)), 4),
        },
        "compile": compile_share(contexts, seconds[engines.OURS]),
        "matches": matches(contexts),
        "transposes": transposes(result.model, inputs),
    }


def timed(runs: dict[str, Callable[..., Any]], inputs: Any, rounds: int) -> dict[str, list[float]]:
    import torch

    from fxprune.benchmark import interleave

    with torch.no_grad():
        calls = {name: lambda call=call: call(*inputs) for name, call in runs.items()}
        return interleave(calls, rounds, BURST_MS, PAUSE_MS)


def warm_up(torch: Any) -> None:
    """Compile something small first, so that no engine pays for the compiler's own first start."""
    with torch.no_grad():
        torch.compile(lambda x: torch.relu(x) + 1)(torch.zeros(64))


def copy_double(model: Any) -> Any:
    import copy

    return copy.deepcopy(model).double()


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


def transposes(model: Any, inputs: Any) -> dict[str, int]:
    """Transposes the model itself has, and those in the graph after our passes."""
    import torch

    from fxprune.backend import rewrite
    from fxprune.capture import capture
    from fxprune.config import Config

    own = left = 0
    for graph in capture(model, inputs):
        with torch.no_grad():
            own += sum(map(is_transpose, graph.gm.graph.nodes))
            left += sum(map(is_transpose, rewrite(graph.gm, graph.inputs, Config())[0].graph.nodes))
    return {"in the model": own, "in the compiled graph": left}


def is_transpose(node: Any) -> bool:
    target = node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    return node.op in ("call_function", "call_method") and str(target).partition(".")[0] in ("permute", "transpose", "t")


def machine() -> dict[str, Any]:
    """Return the processor's name and cores, and a folder name made of them."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [x.partition(":")[2].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
        name = lines[0] if lines else name
    cores = os.cpu_count() or 1
    words = "".join(c if c.isalnum() else " " for c in name.lower().replace("(r)", " ").replace("(tm)", " ")).split()
    flags = [f for f in ("amx_bf16", "avx512f", "avx2") if info.is_file() and f" {f}" in info.read_text()]
    return {
        "cpu": name,
        "cores": cores,
        "isa": flags[:1],
        "system": platform.system(),
        "slug": "-".join([*words, f"{cores}c"]),
    }


def versions() -> dict[str, str]:
    import torch

    import fxprune

    return {"python": platform.python_version(), "torch": torch.__version__, "fxprune": fxprune.__version__}


def commit() -> str:
    """Return the commit the sources are at, with a + when they differ from it; "none" outside a repository."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def show(record: dict[str, Any]) -> None:
    for name, row in record["engines"].items():
        print(f"    {name:24}{row['ms']:10.3f} ms  (p10 {row['p10']:.3f}, p90 {row['p90']:.3f})  error {row['error']:.1e}")
    for name, reason in record["not_comparable"].items():
        print(f"    {name:24}not comparable: {reason}")
    over = record["speedup_over_dense"]
    print(f"    {'not comparable with' if over is None else f'{over:.2f}x of'} the fastest dense runtime", end="; ")
    print(f"{record['speedup']:.2f}x of {record['fastest_stock']}; unpruned {record['unpruned']['ratio']:.3f}x of stock")


if __name__ == "__main__":
    sys.exit(main())
