"""``fxprune.prune``: write zeros into ordinary dense weights, in patterns that the compiler runs fast."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fxprune.backend import groups_of, hwprune, stock
from fxprune.capture import ISOLATED, NO_LIMITS, arguments, evaluating
from fxprune.config import Config
from fxprune.errors import ConfigError, NothingToPrune
from fxprune.lowering.kernels import KernelTables
from fxprune.lowering.measure import Measure
from fxprune.match import Match
from fxprune.plan import LayerPlan, Plan, PrunedWeight, register
from fxprune.planner import Choice, choose_masks, hits
from fxprune.prunable import prunable
from fxprune.report import Table
from fxprune.sparsity import dcp
from fxprune.staircase import choose_levels
from fxprune.target import Speed, search

# the options that matter to a compile of a model that is pruned already
_COMPILE = ("min_speedup", "autotune", "cache_dir", "freeze", "fallback", "mode", "inductor")


@dataclass(frozen=True)
class PruneResult:
    """model: a plain module with zeros. plan: pattern, tiles and counts. sparsity: achieved, by the keys asked for.

    speed: what was predicted and measured when a speed was asked for, else ``None``.
    """

    model: nn.Module
    plan: Plan
    sparsity: dict[str, float]
    report: Table
    speed: Speed | None = None


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    sparsity: float | Mapping[str, float] | None = None,
    target_speedup: float | None = None,
    target_latency_ms: float | None = None,
    inplace: bool = False,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    **options: Any,
) -> PruneResult:
    """Prune ``model`` and return a copy (the model itself with ``inplace=True``). Give one of the three:

    sparsity: fraction of zeros; a float, or a dict by kind ("depthwise", "pointwise", "linear") or layer glob.
    target_speedup: of the whole model over stock ``torch.compile`` with the same options, on this machine at these inputs.
    target_latency_ms: of the whole model. For either the masks that retain most importance are searched, compiled,
        measured and corrected; ``result.speed`` says what came out, and :class:`~fxprune.errors.TargetNotReached` warns.

    example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; the model is run on
        them once, in evaluation mode, to find its layers.
    filter_fn: ``(module, fqn) -> bool``; layers it refuses stay as they are.
    options: fields of :class:`fxprune.Config`.

    Raises an error of :mod:`fxprune.errors` and changes nothing when the request makes no sense.
    Sources: DEPrune (NeurIPS 2024) Sec. 4-5 for ``dcp``, tile-wise sparsity (SC'20) for ``tile``.
    """
    goal = {"sparsity": sparsity, "target_speedup": target_speedup, "target_latency_ms": target_latency_ms}
    config = Config.from_options({**goal, **options})
    if sparsity is None and not config.has_target:
        expected = "a fraction of zeros, or target_speedup= or target_latency_ms= in its place"
        raise ConfigError(name="sparsity", given=sparsity, expected=expected)
    matches = prunable(model, example_inputs, config, filter_fn)
    unit, speed = KernelTables().unit, None
    if config.has_target:
        speed = _search(model, example_inputs, matches, config)
        chosen = choose_levels(matches, config, unit, speed.levels)
    else:
        chosen = choose_masks(matches, config, unit, _gain(matches, config))
    if not chosen and speed is None:
        raise NothingToPrune(
            reason=f"sparsity={sparsity!r} asks nothing of the {len(matches)} prunable layer(s) found",
            remedy="Run fxprune.explain(model, example_inputs) for the layers and their kinds.",
        )
    target = model if inplace else copy.deepcopy(model)
    layers = _apply_all(chosen, target)
    return PruneResult(target, Plan(layers), _achieved(layers, sparsity), _table(layers, speed), speed)


def _search(model: nn.Module, example_inputs: Any, matches: list[Match], config: Config) -> Speed:
    """Find levels for a speed; every plan is compiled and measured on a copy of ``model``."""
    args, kwargs = arguments(example_inputs)
    plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in _COMPILE}

    def compiled(module: nn.Module, backend: Callable[..., Any]) -> Callable[[], Any]:
        run = partial(torch.compile(module, backend=backend, **ISOLATED), *args, **kwargs)
        with torch._dynamo.config.patch(NO_LIMITS):
            run()
        return run

    def build(levels: Mapping[str, float]) -> Callable[[], Any]:
        module = copy.deepcopy(model)
        _apply_all(choose_levels(matches, config, KernelTables().unit, levels), module)
        return compiled(module, partial(hwprune, options=plain))

    with evaluating(model), torch.inference_mode(False), torch.no_grad():
        start = time.perf_counter()
        groups = groups_of(matches, config)
        seconds = time.perf_counter() - start
        return search(groups, config, compiled(model, partial(stock, config=config)), build, seconds=seconds)


def _apply_all(chosen: Mapping[str, Choice], model: nn.Module) -> list[LayerPlan]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [_apply(choice, parameters) for choice in chosen.values()]


@torch.no_grad()
def _apply(choice: Choice, parameters: dict[str, nn.Parameter]) -> LayerPlan:
    match, layer = choice.match, choice.layer
    parameter = parameters[match.parameter]
    mask = match.restore(layer.mask).reshape(parameter.shape)
    parameter.masked_fill_(~mask, 0)
    register(parameter, PrunedWeight(choice.pattern, layer, mask))
    every = len(layer.tiling.columns) == layer.tiling.shape[0]
    return LayerPlan(
        name=match.name,
        parameter=match.parameter,
        kind=match.kind,
        pattern=choice.pattern,
        shape=tuple(parameter.shape),
        target=choice.target,
        sparsity=1.0 - mask.float().mean().item(),
        granularity=layer.tiling.granularity,
        counts=tuple(layer.counts),
        columns=None if every else tuple(layer.tiling.columns.tolist()),
        note=layer.note,
    )


def _gain(matches: list[Match], config: Config) -> Callable[[str, int, int], float] | None:
    """HSR's alpha: microseconds between two kept counts per DR group of one depthwise layer (Sec. 5.2)."""
    if config.recalibration != "deprune":
        return None
    by_name = {m.parameter: m for m in matches}
    measure = Measure(config, KernelTables().unit)

    def gain(parameter: str, kept: int, rounded: int) -> float:
        match = by_name[parameter]
        share = {}
        for count in (kept, rounded):
            total = min(config.group, match.matrix_shape[0]) * match.matrix_shape[1]
            plan = dcp.plan_layers(
                {parameter: match.matrix(match.value.detach()).abs()},
                {parameter: 1.0 - count / total},
                group=config.group,
                recalibration="off",
            )
            share[count] = measure(match, plan[parameter]).sparse
        return abs(share[kept] - share[rounded])

    return gain


def _achieved(layers: list[LayerPlan], asked: float | Mapping[str, float] | None) -> dict[str, float]:
    """Element-weighted sparsity by the keys asked for, and by kind."""
    groups: dict[str, list[LayerPlan]] = {"all": layers}
    for layer in layers:
        groups.setdefault(layer.kind, []).append(layer)
    for key in asked if isinstance(asked, Mapping) else ():
        named = [layer for layer in layers if hits(key, layer.name, layer.parameter)]
        if named:
            groups[key] = named
    return {key: _weighted(members) for key, members in groups.items()}


def _weighted(layers: list[LayerPlan]) -> float:
    sizes = [math.prod(layer.shape) for layer in layers]
    return sum(s * layer.sparsity for s, layer in zip(sizes, layers, strict=True)) / max(sum(sizes), 1)


def _table(layers: list[LayerPlan], speed: Speed | None) -> Table:
    head = ("layer", "kind", "pattern", "shape", "target", "sparsity", "kept per tile", "note")
    rows = []
    for layer in layers:
        kept = f"{min(layer.counts)}..{max(layer.counts)}" if layer.counts else "-"
        shape = "x".join(map(str, layer.shape))
        numbers = (f"{layer.target:.1%}", f"{layer.sparsity:.1%}")
        rows.append((layer.name, layer.kind, layer.pattern, shape, *numbers, kept, layer.note))
    return Table("pruned layers", head, rows, {} if speed is None else {"speed": speed, "retained": f"{speed.retained:.1%}"})
