"""What the benchmarks of single operators share: arguments, interleaved timing, and the file of results."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fxprune.lowering import library
from torch import Tensor

Calls = dict[str, Callable[[], Tensor]]


def arguments(description: str | None, seconds: float, what: str) -> argparse.Namespace:
    """Parse the command line, set the number of threads and load the operators; ``seconds``: by default, per case."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--filter", default="", help="only cases whose name matches this regular expression")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=seconds, help="time per case")
    parser.add_argument("--quantile", type=float, default=0.5, help="of the calls' times")
    parser.add_argument("--json", help="write the rows to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not library.load():
        parser.exit(1, f"{what} need the C++ library, which is not built\n")
    print(f"isa {library.isa()}, {options.threads} threads, torch {torch.__version__}")
    return options


def write(options: argparse.Namespace, rows: Sequence[Any]) -> None:
    """Write dataclass rows where ``--json`` says, with what they were measured on."""
    if options.json:
        report = {"isa": library.isa(), "threads": options.threads, "torch": torch.__version__}
        Path(options.json).write_text(json.dumps({**report, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def measure(calls: Calls, seconds: float, quantile: float) -> dict[str, float]:
    """Return a quantile of each call's microseconds over interleaved rounds of about half a millisecond."""
    clock = time.perf_counter
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        start = clock()
        call()
        repeats[name] = min(50, max(1, int(5e-4 / max(clock() - start, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in calls}
    stop = clock() + seconds
    while clock() < stop or len(times["ours"]) < 5:
        for name, call in calls.items():
            for _ in range(repeats[name]):
                start = clock()
                call()
                times[name].append((clock() - start) * 1e6)
    return {name: sorted(values)[int(quantile * len(values))] for name, values in times.items()}
