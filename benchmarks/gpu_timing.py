"""Times calls on a GPU: each in a CUDA graph of several calls, interleaved with its rivals, by CUDA events.

A graph takes the cost of starting kernels from Python out of the measurement. A rival that cannot be captured, or that
this machine does not have, is left out with its reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]
Row = dict[str, Any]


class Rivals:
    """Named calls that do the same work, and why others are missing."""

    def __init__(self) -> None:
        self.calls: dict[str, Call] = {}
        self.left_out: dict[str, str] = {}

    def add(self, name: str, make: Callable[[], Call]) -> None:
        """Add the call that ``make`` returns, once it has run."""
        try:
            call = make()
            call()
            torch.cuda.synchronize()
        except Exception as error:
            text = str(error).splitlines() or [type(error).__name__]
            self.left_out[name] = text[0][:160]
        else:
            self.calls[name] = call


def micros(calls: dict[str, Call], rounds: int = 15, per_graph: int = 10) -> dict[str, float]:
    """Return the median microseconds of each call, rounds interleaved. Without a graph a call's name gets "(eager)"."""
    runs: dict[str, Call] = {}
    for name, call in calls.items():
        graph = captured(call, per_graph)
        runs[name if graph is not None else f"{name} (eager)"] = graph or (
            lambda call=call: [call() for _ in range(per_graph)]
        )
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end) * 1e3 / per_graph)
    return {name: statistics.median(taken) for name, taken in samples.items()}


def captured(call: Call, repeats: int) -> Call | None:
    """Return a replay of ``repeats`` calls, None when they cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                call()
        graph.replay()
        torch.cuda.synchronize()
    except Exception:
        torch.cuda.synchronize()
        return None
    return graph.replay


def row(name: str, rivals: Rivals, predicted: float | None, **more: Any) -> Row:
    """Time all calls of a case; the first one is ours."""
    times = micros(rivals.calls)
    ours = next((us for name, us in times.items() if name.startswith("ours")), None)
    dense = {name: us for name, us in times.items() if not name.startswith("ours")}
    best = min(dense, key=lambda name: dense[name]) if dense else None
    speedup = dense[best] / ours if best and ours else None
    rounded = {name: round(us, 2) for name, us in times.items()}
    return {
        "case": name, "us": rounded, "best_rival": best, "speedup": None if speedup is None else round(speedup, 3),
        "predicted": predicted, **{k: v(ours) if ours else None for k, v in more.items()}, "left_out": rivals.left_out,
    }  # fmt: skip


def share(rate: float, ceiling: float) -> float:
    return round(rate / ceiling, 3)
