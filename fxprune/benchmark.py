"""``fxprune.benchmark``: time engines against each other in one process, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from fxprune.capture import arguments, evaluating
from fxprune.report import Table


def benchmark(
    model: nn.Module,
    example_inputs: Any,
    *,
    engines: dict[str, Callable[..., Any]] | None = None,
    rounds: int = 20,
    burst_ms: float = 30.0,
    **options: Any,
) -> Table:
    """Return the median, p10 and p90 milliseconds of each engine, and its ratio to the first.

    engines: callables by name; by default eager, ``torch.compile`` and ``torch.compile(backend="hwprune")`` on ``model``.
    rounds: interleaved rounds, fixed beforehand. burst_ms: each round repeats an engine about this long.
    options: fields of :class:`fxprune.Config` for the default hwprune engine.
    """
    args, kwargs = arguments(example_inputs)
    if engines is None:
        engines = {
            "eager": model,
            "inductor": torch.compile(model),
            "hwprune": torch.compile(model, backend="hwprune", options=dict(options)),
        }
    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        times = interleave({name: partial(e, *args, **kwargs) for name, e in engines.items()}, rounds, burst_ms)
    first = statistics.median(next(iter(times.values())))
    rows = []
    for name, samples in times.items():
        middle = statistics.median(samples)
        low, high = quantile(samples, 0.1), quantile(samples, 0.9)
        rows.append((name, f"{middle:.3f}", f"{low:.3f}", f"{high:.3f}", f"{first / middle:.2f}x"))
    summary = {"threads": torch.get_num_threads(), "rounds": rounds}
    return Table("milliseconds per call", ("engine", "median", "p10", "p90", "speed-up"), rows, summary)


def interleave(
    calls: dict[str, Callable[[], Any]],
    rounds: int,
    burst_ms: float,
    pause_ms: float = 0.0,
    undisturbed: Callable[[], bool] | None = None,
) -> dict[str, list[float]]:
    """Return milliseconds per call, one sample per round and engine, in interleaved bursts.

    pause_ms: idle time and one call of its own before each burst, for engines whose threads go on spinning after a call.
    undisturbed: asked after each round; up to ``rounds`` rounds for which it says no are run once more instead.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(burst_ms / 1e3 / max(time.perf_counter() - start, 1e-6)))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    kept, again = 0, rounds
    while kept < rounds:
        one = {name: _burst(call, repeats[name], pause_ms) for name, call in calls.items()}
        if again and undisturbed is not None and not undisturbed():
            again -= 1
            continue
        kept += 1
        for name, milliseconds in one.items():
            samples[name].append(milliseconds)
    return samples


def _burst(call: Callable[[], Any], repeats: int, pause_ms: float) -> float:
    if pause_ms:
        time.sleep(pause_ms / 1e3)
        call()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats * 1e3


def quantile(samples: list[float], share: float) -> float:
    """Return the nearest-rank quantile."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, max(0, round(share * (len(ordered) - 1))))]
