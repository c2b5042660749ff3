"""Files that leave Python: their sizes, and how fast each runtime runs them, dense and pruned side by side.

    python benchmarks/bench_export.py write FOLDER [--models ...]
    python benchmarks/bench_export.py time FOLDER [--models ...]
    python benchmarks/render_export.py

``write`` prunes each model of ``cases.py`` and writes it twice in every format: by torch alone ("dense": the same
zeros, unused) and by ``fxprune.export`` ("pruned"). ``time`` loads the files in a fresh process, compares outputs with
fp64, and times all of a model in interleaved rounds. One JSON file per model goes to
benchmarks/results/<machine>/export-MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engines
import onnxruntime
import peers
import torch
import zoo
from cases import Case
from machine import ENVIRONMENT, RESULTS, Gate, machine, origin, own_environment
from torch import Tensor, nn

import fxprune
from fxprune.benchmark import interleave, quantile

MODELS = ("mobilenetv2_100", "efficientnet_b0", "bert_base")
FORMATS = {"exported_program": "pt2", "aoti": "aoti.pt2", "onnx": "onnx"}
SIDES = ("dense", "pruned")
ROUNDS, BURST_MS, PAUSE_MS, THREADS = 12, 60.0, 30.0, 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("write", "time"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--out", type=Path, help="folder of the JSON files (default: results/<machine>)")
    args = parser.parse_args(argv)
    torch.set_num_threads(THREADS)
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in args.models:
        if args.stage == "write":
            write(name, args.folder)
            continue
        out = args.out or RESULTS / machine()["slug"]
        out.mkdir(parents=True, exist_ok=True)
        (out / f"export-{name}.json").write_text(json.dumps(timed(name, args.folder), indent=1) + "\n")
    return 0


def file(folder: Path, name: str, side: str, format: str) -> Path:
    return folder / f"{name}-{side}.{FORMATS[format]}"


def write(name: str, folder: Path) -> None:
    """Write every format of one model, dense and pruned."""
    case = Case(name, 1)
    dense, inputs = zoo.prepared(case)
    model = fxprune.prune(dense, inputs, sparsity=case.sparsity, ignored_layers=case.ignored).model
    with torch.no_grad(), peers.quiet():
        program = torch.export.export(model, tuple(inputs))
        package = os.fspath(file(folder, name, "dense", "aoti"))
        options = {"freezing": True, "aot_inductor.package": True}
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=options)
        program.example_inputs = None  # not in our files either
        torch.export.save(program, file(folder, name, "dense", "exported_program"))
        torch.onnx.export(model, tuple(inputs), file(folder, name, "dense", "onnx"), dynamo=True, external_data=False)
    for format in FORMATS:
        print(fxprune.export(model, tuple(inputs), file(folder, name, "pruned", format), format=format), flush=True)


def timed(name: str, folder: Path) -> dict[str, Any]:
    """Load and time the files of one model; returns its record."""
    case = Case(name, 1)
    model, inputs = zoo.prepared(case)
    exact = engines.exact(fxprune.prune(model, inputs, sparsity=case.sparsity, ignored_layers=case.ignored).model, inputs)
    runs = {(f, s): load(file(folder, name, s, f), f, s) for f in FORMATS for s in SIDES}
    with torch.no_grad():
        errors = {key: engines.relative_error(run(*inputs), exact) for key, run in runs.items()}
        gate = Gate()
        calls = {f"{f} {s}": lambda run=run: run(*inputs) for (f, s), run in runs.items()}
        samples = interleave(calls, ROUNDS, BURST_MS, PAUSE_MS, gate)
    rows = {
        f: {
            s: {
                "mb": engines.megabytes(file(folder, name, s, f)),
                "ms": round(statistics.median(samples[f"{f} {s}"]), 3),
                "p10": round(quantile(samples[f"{f} {s}"], 0.1), 3),
                "p90": round(quantile(samples[f"{f} {s}"], 0.9), 3),
                "error": float(f"{errors[f, s]:.2g}"),
            }
            for s in SIDES
        }
        for f in FORMATS
    }
    about = origin()
    about["versions"]["onnxruntime"] = onnxruntime.__version__
    setting = {"threads": THREADS, "rounds": ROUNDS, "disturbed": gate.disturbed, "environment": ENVIRONMENT}
    return {
        "exported": name, "batch": 1, "sparsity": case.sparsity, "formats": rows, **about, **setting,
    }  # fmt: skip


def load(path: Path, format: str, side: str) -> Callable[..., Any]:
    """Return the callable of a file, for :data:`THREADS` threads."""
    if format == "onnx":
        return peers.session(path)
    if side == "pruned":
        return fxprune.load(path)
    if format == "aoti":
        return torch._inductor.aoti_load_package(os.fspath(path))  # type: ignore[no-any-return]
    return _inference(torch.export.load(path).module())


def _inference(module: nn.Module) -> Callable[..., Any]:
    def run(*args: Tensor) -> Any:
        with torch.no_grad():
            return module(*args)

    return run


if __name__ == "__main__":
    if sys.argv[1:2] == ["time"]:
        own_environment()
    sys.exit(main())
