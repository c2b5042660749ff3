"""The one frozen configuration of a prune or a compile; option names are its field names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fxprune.errors import ConfigError, UnknownOption, nearest
from fxprune.gradients import PRUNINGS, TARGETS, ratios

KINDS = ("depthwise", "pointwise", "conv", "linear", "rnn")

_CHOICES = {
    "importance": ("magnitude", "l1", "l2", "taylor", "wanda", "random"),
    "scope": ("layer", "global"),
    "ranking": ("corrected", "published"),
    "recalibration": ("deprune", "deterministic", "off"),
    "channel_score": ("l1", "l2", "fpgm"),
    "autotune": ("fast", "full", "off"),
    "fallback": ("inductor", "eager", "tensorrt"),
    "grad_pruning": PRUNINGS,
    "grad_target": TARGETS,
}


_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Config:
    """Options of :func:`fxprune.prune` and of ``torch.compile(backend="hwprune", options=...)``.

    sparsity: fraction of zeros, a float or a dict by kind ("depthwise", "pointwise", "conv", "linear", "rnn") or by
        layer-name glob; later, more specific keys win. ``None`` prunes nothing, except in :func:`fxprune.prune` with
        an n:m pattern, whose sparsity is 1 - n/m.
    target_speedup: instead of a sparsity, how many times faster than stock the whole model shall be on this machine.
    target_latency_ms: the same as milliseconds per call.
    max_sparsity: what no layer may exceed on the way to a target.
    pattern: "auto" (dcp for depthwise, tile for the rest), a pattern name, or a dict by kind: dcp, tile, channel,
        unstructured, "2:4" or any n:m, block (block:32x32), tvw (tvw:2:4), tew (tew:0.05).
    importance: "magnitude" (= "l1", ``|w|``), "l2" (``w^2``), "random"; with calibration data "taylor" (``(g*w)^2``)
        and "wanda" (``|w|`` times the norm of its input); or a callable ``(name, weight) -> element scores`` of
        the weight's shape. seed: of "random" and of ``grad_pruning``.
    ignored_layers: layer names or globs that stay as they are.
    group: channels per DR group (DEPrune, Sec. 4.1). balance: equal counts per group (BWT).
    recalibration: "deprune" measures the gain of each rounding (HSR as published), "deterministic" needs no timing, "off".
    granularity: output features per tile, an int or a dict by kind; ``None`` takes the kernel's own.
    columns: let `tile` remove whole output features (2-D). ``None``: only for linear layers, because the
        outputs of a 1x1 convolution may feed a depthwise one (DEPrune, Sec. 4.2).
    scope: rank tiles per "layer" or over all layers ("global"). ranking: "corrected" or "published".
    apriori: for `tile`, `tvw` and `tew`: share of columns and rows that an element-wise mask settles before the ranking.
    channel_score: what ranks the filters of `channel`: "l1" or "l2" norm of the importance, or "fpgm", the distance to
        the layer's other filters (DEPrune, Table 5).
    min_speedup: a match must be at least this much faster than dense to leave dense.
    autotune: "fast" measures with few rounds, "full" with many, "off" trusts the cost model.
    cache_dir: where measured times are kept; ``None`` is the user's cache folder.
    freeze: weights will not change after compile: no checks per call, remaining constants folded.
    require_sparse: raise when a pruned layer stays dense.
    fallback: what compiles the rest of the graph, and what a failed rewrite falls back to: "inductor", "eager", or
        "tensorrt" (Torch-TensorRT, on a GPU, for inference with ``freeze=True``: an engine holds its weights).
    verify: run the rewritten graph beside the original on the example inputs and compare (slow).
    dump: folder for the graphs before and after each pass, as numbered files that run.
    tolerance: bound of ``verify`` against an fp64 run, relative.
    mode / inductor: Inductor's mode and options for the rest of the graph.
    tensorrt: options of Torch-TensorRT, for ``fallback="tensorrt"`` and ``fxprune.export(format="torch_tensorrt")``.
    grad_sparsity: in training, prune the gradient that each convolution's and linear layer's data gradient reads: "n:m"
        keeps n of m output channels (SDGP, arXiv 2202.00774), "auto" or "auto:n:m" only in layers where it was measured to
        be faster; "off"; or a dict of these by the optimizer step they begin at. Inference is not affected.
    grad_pruning: which n stay: "magnitude", "rescaled_magnitude" (each sample and channel keeps its L1 norm),
        "group_rescaled_magnitude" (each group does), "random", "mvue" (unbiased).
    grad_target: the gradient that reads the pruned copy: "dX" (data), "dW" (weight, pruned along what it adds up), "both".
    """

    sparsity: float | Mapping[str, float] | None = None
    target_speedup: float | None = None
    target_latency_ms: float | None = None
    max_sparsity: float = 0.9
    pattern: str | Mapping[str, str] = "auto"
    importance: str | Callable[..., Any] = "magnitude"
    seed: int = 0
    ignored_layers: tuple[str, ...] = ()
    group: int = 32
    balance: bool = True
    recalibration: str = "deterministic"
    granularity: int | Mapping[str, int] | None = None
    columns: bool | Mapping[str, bool] | None = None
    scope: str = "layer"
    ranking: str = "corrected"
    apriori: float = 0.0
    channel_score: str = "l2"
    min_speedup: float = 1.02
    autotune: str = "fast"
    cache_dir: str | None = None
    freeze: bool = False
    require_sparse: bool = False
    fallback: str = "inductor"
    verify: bool = False
    dump: str | None = None
    tolerance: float = 1e-3
    mode: str | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)
    tensorrt: Mapping[str, Any] = field(default_factory=dict)
    grad_sparsity: str | Mapping[int, str] | None = None
    grad_pruning: str = "magnitude"
    grad_target: str = "dX"

    def __post_init__(self) -> None:
        for name, legal in _CHOICES.items():
            value = getattr(self, name)
            if name == "importance" and callable(value):
                continue
            if value not in legal:
                raise ConfigError(name=name, given=value, expected="one of " + ", ".join(map(repr, legal)))
        _check_sparsity(self.sparsity)
        ratios(self.grad_sparsity)
        self._check_target()
        for name in ("balance", "freeze", "require_sparse", "verify"):
            _check_type(name, getattr(self, name), bool, "True or False")
        for name in ("cache_dir", "dump"):
            if getattr(self, name) is not None:
                _check_type(name, getattr(self, name), str, "the path of a folder, or None")
        if self.mode is not None and self.mode not in _MODES:
            raise ConfigError(name="mode", given=self.mode, expected="one of " + ", ".join(map(repr, _MODES)))
        _check_type("inductor", self.inductor, Mapping, "a dict of Inductor's options")
        _check_type("tensorrt", self.tensorrt, Mapping, "a dict of the options of torch_tensorrt.dynamo.compile")
        if self.fallback == "tensorrt" and not self.freeze:
            expected = 'True beside fallback="tensorrt", whose engines hold weights'
            raise ConfigError(name="freeze", given=False, expected=expected)
        for value in self.pattern.values() if isinstance(self.pattern, Mapping) else (self.pattern,):
            _check_type("pattern", value, str, "the name of a pattern, or a dict of names by kind")
        for value in self.columns.values() if isinstance(self.columns, Mapping) else (self.columns,):
            if value is not None:
                _check_type("columns", value, bool, "True, False or None, or a dict by kind")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or not 0 <= self.seed < 2**31:
            raise ConfigError(name="seed", given=self.seed, expected="an integer from 0 to 2**31 - 1")
        _check_number("min_speedup", self.min_speedup, 0.0, 100.0)
        _check_number("tolerance", self.tolerance, 0.0, 1.0)
        _check_number("apriori", self.apriori, 0.0, 0.5)
        _check_positive("group", self.group)
        sizes = self.granularity.values() if isinstance(self.granularity, Mapping) else (self.granularity,)
        for size in sizes:
            if size is not None:
                _check_positive("granularity", size)
        for name in ("pattern", "granularity", "columns"):
            _check_kinds(name, getattr(self, name))
        if isinstance(self.ignored_layers, str) or not all(isinstance(name, str) for name in self.ignored_layers):
            expected = "a sequence of layer names, not one string"
            raise ConfigError(name="ignored_layers", given=self.ignored_layers, expected=expected)
        object.__setattr__(self, "ignored_layers", tuple(self.ignored_layers))

    @property
    def has_target(self) -> bool:
        """True when a speed is given instead of a sparsity."""
        return self.target_speedup is not None or self.target_latency_ms is not None

    @property
    def prunes(self) -> bool:
        """True when a compile shall zero weights."""
        return self.sparsity is not None or self.has_target

    def _check_target(self) -> None:
        goals = ("sparsity", "target_speedup", "target_latency_ms")
        given = [name for name in goals if getattr(self, name) is not None]
        if self.has_target and len(given) > 1:
            expected = f"no {' and no '.join(given[:-1])} beside it: each of them decides the sparsity"
            raise ConfigError(name=given[-1], given=getattr(self, given[-1]), expected=expected)
        if self.target_speedup is not None:
            _check_number("target_speedup", self.target_speedup, 1.0, 1000.0)
        if self.target_latency_ms is not None:
            _check_number("target_latency_ms", self.target_latency_ms, 1e-6, 1e9)
        _check_number("max_sparsity", self.max_sparsity, 0.0, 1.0)
        if self.max_sparsity in (0.0, 1.0):
            raise ConfigError(name="max_sparsity", given=self.max_sparsity, expected="a fraction between 0 and 1")

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None, mode: str | None = None) -> Config:
        """Build from the ``options`` dict of ``torch.compile``.

        Raises :class:`~fxprune.errors.UnknownOption` with the nearest legal name.
        """
        given = dict(options or {})
        legal = [f.name for f in dataclasses.fields(cls)]
        for name in given:
            if name not in legal:
                raise UnknownOption(name=name, nearest=nearest(name, legal), legal=", ".join(legal))
        if mode is not None:
            given.setdefault("mode", mode)
        return cls(**given)

    def by_kind(self, name: str, kind: str) -> Any:
        """Return an option that may be a dict by kind; ``None`` when the dict has no such kind."""
        value = getattr(self, name)
        return value.get(kind) if isinstance(value, Mapping) else value


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not ok:
        raise ConfigError(name=name, given=value, expected=f"a number from {low:g} to {high:g}")


def _check_type(name: str, value: Any, kind: type, expected: str) -> None:
    if not isinstance(value, kind):
        raise ConfigError(name=name, given=value, expected=expected)


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(name=name, given=value, expected="a positive integer")


def _check_kinds(name: str, value: Any) -> None:
    for kind in value if isinstance(value, Mapping) else ():
        if kind not in KINDS:
            raise ConfigError(name=name, given=kind, expected="keys among " + ", ".join(KINDS))


def _check_sparsity(sparsity: Any) -> None:
    values = sparsity.items() if isinstance(sparsity, Mapping) else [("sparsity", sparsity)]
    for key, value in values:
        if not isinstance(key, str):
            raise ConfigError(name="sparsity", given=key, expected="keys that are kinds or layer-name globs")
        if value is None and not isinstance(sparsity, Mapping):
            continue
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1
        if not ok:
            name = "sparsity" if key == "sparsity" else f"sparsity[{key!r}]"
            raise ConfigError(name=name, given=value, expected="a fraction of zeros, 0 <= sparsity < 1")
