"""Time one match sparse and dense at the user's shapes, and remember it on disk.

Interleaved bursts, the fastest round of each: the question is which kernel is faster on an undisturbed machine.
"""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cost
from ..config import Config
from ..context import Timing, Unit
from ..match import Match
from ..sparsity import dcp, tile
from ..sparsity.pattern import LayerMask
from . import library
from .measure_rnn import Weight, as_linear, predicted, recurrent_calls

ROUNDS = {"fast": 5, "full": 25}
_BURST_SECONDS = 3e-4
_PATIENCE = 1.0  # seconds in which times may come to agree; large layers on a busy machine would take minutes
_GPU_BURST = 10


class Measure:
    """Callable ``(match, mask) -> Timing``; ``mask=None`` times the kernel with everything kept.

    A recurrent weight_hh is timed together with its weight_ih, given as ``inputs`` (match, mask).
    """

    def __init__(self, config: Config, units: Callable[..., Unit]) -> None:
        self._config = config
        self._units = units
        self._cache = TimingCache(config.cache_dir) if config.autotune != "off" else None
        self._rates: dict[str, dict[str, float]] | None = None
        self.seconds = 0.0

    def __call__(self, match: Match, mask: LayerMask | None, inputs: Weight | None = None) -> Timing:
        if self._cache is None or not library.available():
            return self.predict(match, mask, inputs)
        start = time.perf_counter()
        try:
            key = self._key(match, mask) + (self._key(*inputs) if inputs is not None else "")
            micros = self._cache.get(key)
            if micros is None:
                micros, settled = self._time(match, mask, inputs)
                if settled:
                    self._cache.put(key, micros)
            sparse, dense, feature_major = micros
            return Timing(sparse, dense, feature_major, measured=True)
        finally:
            self.seconds += time.perf_counter() - start

    def _key(self, match: Match, mask: LayerMask | None) -> str:
        g = match.geometry
        kept = 1.0 if mask is None else mask.share
        tiling = None if mask is None else mask.tiling
        unit: tuple[int, ...] = (0, 0) if tiling is None else (tiling.granularity, len(tiling.columns))
        if mask is not None and mask.rest is not None:
            unit = (*unit, round(mask.rest.share * 100))
        shape = [cost.hint(s) for s in match.geometry.x]
        window = (g.kernel, g.stride, g.padding, g.dilation, g.groups)
        where = "" if match.value.device.type == "cpu" else torch.cuda.get_device_name(match.value.device)
        on = (where, str(match.value.dtype)) if where or match.value.dtype != torch.float32 else ()
        on = (*on, "halved") if mask is not None and mask.halved else on
        on = (*on, "tf32") if match.tf32 else on
        return repr((match.kind, shape, match.matrix_shape, *window, unit, round(kept * 20), *on))

    def _time(self, match: Match, mask: LayerMask | None, inputs: Weight | None) -> tuple[list[float], bool]:
        sizes = [cost.hint(s) for s in match.geometry.x]
        unit = self._units(match.kind, match.value.dtype, match.value.device)
        with torch.inference_mode():
            if inputs is not None:
                runs = recurrent_calls(inputs, (match, mask), unit, *sizes[:2])
            else:
                x = torch.randn(sizes, device=match.value.device, dtype=match.value.dtype)
                runs = [sparse_call(match, mask, unit, x), *dense_calls(match, x)]
            micros, settled = interleave(runs, ROUNDS[self._config.autotune])
        return [micros[0], min(micros[1:]), micros[1]], settled

    def predict(self, match: Match, mask: LayerMask | None, inputs: Weight | None = None) -> Timing:
        """Return what the cost model says, with this machine's rates where it was calibrated."""
        if inputs is not None:
            pair = [self.predict(*as_linear(weight)) for weight in (inputs, (match, mask))]
            return predicted(pair, cost.hint(match.geometry.x[0]))
        if match.on_gpu:  # the cost model knows CPUs: without a measurement a GPU's layer stays dense
            timing = cost.predict(match, mask, "avx512")
            return replace(timing, sparse=max(timing.sparse, timing.dense))
        if not library.available():
            return cost.predict(match, mask, "scalar")
        if self._rates is None:
            self._rates = calibrated(self._config.cache_dir)
        return cost.predict(match, mask, library.isa(), self._rates)


def sparse_call(match: Match, mask: LayerMask | None, unit: Unit, x: Tensor) -> Callable[[], Tensor]:
    """Return a call of our operator on ``x`` with the weight of ``match`` under ``mask``."""
    g = match.geometry
    matrix = match.matrix(match.value.detach()).cpu().contiguous()  # masks live on the CPU
    if match.kind == "depthwise":
        kept = torch.ones_like(matrix, dtype=torch.bool) if mask is None else mask.mask
        weight, taps = (t.to(x.device) for t in (matrix * kept, dcp.tap_words(kept)))
        weight = weight.float() if x.device.type == "cpu" else weight
        return lambda: torch.ops.fxprune.depthwise_taps(x, weight, taps, None, *g.windows, "none")
    layer = mask or tile.keep_all(match.matrix_shape, match.tile_width(unit.granularity))
    n, dim, step = match.matrix_shape[0], 1 if match.kind == "pointwise" else -1, g.stride
    if match.kind == "conv":
        weights = tile.imaged(tile.operands(matrix, layer.mask, layer.tiling), layer.tiling, x.device, tf32=match.tf32)
        weights = [t.to(x.device) for t in weights]
        shape = (n, layer.tiling.granularity, *g.windows, g.groups, "none")
        return lambda: torch.ops.fxprune.tile_conv(x, *weights, None, None, *shape)
    x = x.flatten(1) if one_pixel(match) else x
    parts = [(layer.mask, layer.tiling)]
    if layer.rest is not None:
        parts = [(layer.rest.mask, layer.rest.tiling), (layer.mask & ~layer.rest.mask, layer.tiling)]
    calls = []
    for kept, tiling in parts:
        packed = tile.imaged(tile.operands(matrix, kept, tiling), tiling, x.device, layer.halved, match.tf32)
        calls.append(([t.to(x.device) for t in packed], tiling.granularity))

    def run() -> Tensor:
        rows, y = x[:, :, :: step[0], :: step[1]] if step != (1, 1) else x, None
        for operands, granularity in calls:
            y = torch.ops.fxprune.tile_gemm(rows, *operands, None, y, None, n, granularity, dim, "none")
        assert y is not None
        return y

    return run


def dense_calls(match: Match, x: Tensor) -> list[Callable[[], Tensor]]:
    """Return dense calls: first in the layout our kernels use, then the other layouts."""
    g, weight = match.geometry, match.value.detach()
    if match.kind == "linear" and not one_pixel(match):
        matrix = match.matrix(weight).contiguous()
        return [lambda: F.linear(x, matrix)]
    groups = weight.shape[0] if match.kind == "depthwise" else g.groups
    weight = weight.reshape(*weight.shape[:2], *g.kernel)
    window = (None, g.stride, g.padding, g.dilation, groups)
    last = {"memory_format": torch.channels_last}
    x_last, weight_last = x.contiguous(**last), weight.contiguous(**last)
    first = weight.contiguous()
    return [lambda: F.conv2d(x, first, *window), lambda: F.conv2d(x_last, weight_last, *window)]


def one_pixel(match: Match) -> bool:
    """True for a 1x1 convolution of a 1x1 map, which runs as a linear layer."""
    return match.kind == "linear" and match.value.dim() == 4


def interleave(runs: list[Callable[[], Any]], rounds: int) -> tuple[list[float], bool]:
    """Return the fastest microseconds of each, over interleaved bursts of single calls, and whether they settled.

    A busy neighbour stops one thread of a call for milliseconds, so a burst is only as good as its best call.
    """
    repeats = []
    for run in runs:
        run()
        repeats.append(max(2, min(50, math.ceil(_BURST_SECONDS * 1e6 / max(_micros(run), 0.1)))))
    samples: list[list[float]] = [[] for _ in runs]
    end, settled = time.perf_counter() + _PATIENCE, False
    while len(samples[0]) < rounds or not (settled or len(samples[0]) >= 8 * rounds or time.perf_counter() > end):
        for i, run in enumerate(runs):
            samples[i].append(min(_micros(run) for _ in range(repeats[i])))
        settled = len(samples[0]) >= rounds and all(map(_settled, samples))
    return [min(taken) for taken in samples], settled


def _micros(run: Callable[[], Any]) -> float:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return _gpu_micros(run)
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e6


def _gpu_micros(run: Callable[[], Any]) -> float:
    """Time a burst: a call returns before its work is done, and waiting for each would take longer than a kernel."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(_GPU_BURST):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6 / _GPU_BURST


def _settled(samples: list[float]) -> bool:
    """True when three rounds agree with the fastest: other work on the machine makes rounds slower, never faster."""
    return sorted(samples)[2] <= 1.1 * min(samples)


class TimingCache:
    """Measured times in one JSON file per machine, library, torch and thread count."""

    def __init__(self, folder: str | None) -> None:
        self._path = cache_file(folder, "timings")
        self._times: dict[str, list[float]] = self._read()

    def get(self, key: str) -> list[float] | None:
        return self._times.get(key)

    def put(self, key: str, micros: list[float]) -> None:
        self._times[key] = micros
        self._write()

    def _read(self) -> dict[str, list[float]]:
        return {k: v for k, v in read_json(self._path).items() if _is_timing(v)}

    def _write(self) -> None:
        write_json(self._path, {**self._read(), **self._times})


def cache_file(folder: str | None, what: str) -> Path:
    """Return the file of "timings" or "rates" for this machine, library, torch and thread count."""
    root = Path(folder) if folder else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fxprune"
    label = f"{what}-{platform.machine()}-{_cpu_name()}-{library.isa()}-{library.source_hash()[:16]}"
    label += f"-torch{torch.__version__}-{torch.get_num_threads()}t-float32"
    return root / ("".join(c if c.isalnum() or c in "-._" else "_" for c in label) + ".json")


def read_json(path: Path) -> dict[str, Any]:
    """Return what a cache file holds; nothing where it is missing or broken."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Replace a cache file at once; a read-only home only costs the next process its measurements."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as handle:
            json.dump(data, handle)
        Path(handle.name).replace(path)
    except OSError:
        return


def calibrated(folder: str | None) -> dict[str, dict[str, float]]:
    """Return the rates that :func:`~fxprune.lowering.calibrate.calibrate` kept, by operator; none where it did not run."""
    return {name: rates for name, rates in read_json(cache_file(folder, "rates")).items() if _are_rates(rates)}


def _are_rates(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, (int, float)) and v >= 0 for v in value.values())


def _is_timing(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(isinstance(v, (int, float)) and v > 0 for v in value)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "cpu"
