"""``fxprune.prune``: write zeros into ordinary dense weights, in patterns that the compiler runs fast."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxprune.capture import capture, detect
from fxprune.config import KINDS, Config
from fxprune.context import Context
from fxprune.errors import ConfigError, NothingToPrune
from fxprune.left import left_rows, other_readers, why_left
from fxprune.lowering.kernels import KernelTables
from fxprune.lowering.measure import Measure
from fxprune.match import Match
from fxprune.plan import LayerPlan, Plan, PrunedWeight, register
from fxprune.planner import Choice, choose_masks, hits
from fxprune.report import Table
from fxprune.sparsity import dcp


@dataclass(frozen=True)
class PruneResult:
    """model: a plain module with zeros. plan: pattern, tiles and counts. sparsity: achieved, by the keys asked for."""

    model: nn.Module
    plan: Plan
    sparsity: dict[str, float]
    report: Table


def prune(
    model: nn.Module,
    example_inputs: Any,
    *,
    sparsity: float | Mapping[str, float],
    inplace: bool = False,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    **options: Any,
) -> PruneResult:
    """Prune ``model`` and return a copy (the model itself with ``inplace=True``).

    example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; the model is run on
        them once, in evaluation mode, to find its layers.
    sparsity: fraction of zeros; a float, or a dict by kind ("depthwise", "pointwise", "linear") or layer glob.
    filter_fn: ``(module, fqn) -> bool``; layers it refuses stay as they are.
    options: fields of :class:`fxprune.Config`.

    Raises an error of :mod:`fxprune.errors` and changes nothing when the request makes no sense.
    Sources: DEPrune (NeurIPS 2024) Sec. 4-5 for ``dcp``, tile-wise sparsity (SC'20) for ``tile``.
    """
    config = Config.from_options({"sparsity": sparsity, **options})
    contexts = _contexts(model, example_inputs, config)
    matches = prunable(model, contexts, filter_fn)
    chosen = choose_masks(matches, config, KernelTables().unit, _gain(matches, config))
    if not chosen:
        raise NothingToPrune(
            reason=f"sparsity={sparsity!r} asks nothing of the {len(matches)} prunable layer(s) found",
            remedy="Run fxprune.explain(model, example_inputs) for the layers and their kinds.",
        )
    target = model if inplace else copy.deepcopy(model)
    parameters = dict(target.named_parameters(remove_duplicate=False))
    layers = [_apply(choice, parameters) for choice in chosen.values()]
    return PruneResult(target, Plan(layers), _achieved(layers, sparsity), _table(layers, contexts))


def _contexts(model: nn.Module, example_inputs: Any, config: Config) -> list[Context]:
    if not isinstance(model, nn.Module):
        raise ConfigError(name="model", given=type(model).__name__, expected="a torch.nn.Module")
    return [detect(graph, config) for graph in capture(model, example_inputs)]


def prunable(
    model: nn.Module, contexts: Sequence[Context], filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> list[Match]:
    """Return the matches whose weight may be zeroed: a float parameter that nothing unmatched shares."""
    modules = dict(model.named_modules())
    readers = other_readers(contexts)
    found: list[Match] = []
    for ctx in contexts:
        for match in ctx.matches:
            owner = match.parameter.rpartition(".")[0]  # "" when the model itself is the layer
            if owner not in modules or why_left(match, ctx, readers) is not None:
                continue
            if filter_fn is None or filter_fn(modules[owner], match.name):
                found.append(match)
    if not found:
        left = "; ".join(f"{name}: {reason}" for name, _, _, reason in left_rows(contexts, set())[:3])
        raise NothingToPrune(
            reason=f"no depthwise, 1x1 or linear layer among the {len(contexts)} captured graph(s)"
            + (f" may be pruned ({left})" if left else ""),
            remedy="Supported kinds: " + ", ".join(KINDS) + ".",
        )
    return found


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
    if config.recalibrate != "auto":
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
                recalibrate="off",
            )
            share[count] = measure(match, plan[parameter]).sparse
        return abs(share[kept] - share[rounded])

    return gain


def _achieved(layers: list[LayerPlan], asked: float | Mapping[str, float]) -> dict[str, float]:
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


def _table(layers: list[LayerPlan], contexts: Sequence[Context]) -> Table:
    head = ("layer", "kind", "pattern", "shape", "target", "sparsity", "kept per tile", "note")
    rows = []
    for layer in layers:
        kept = f"{min(layer.counts)}..{max(layer.counts)}" if layer.counts else "-"
        shape = "x".join(map(str, layer.shape))
        numbers = (f"{layer.target:.1%}", f"{layer.sparsity:.1%}")
        rows.append((layer.name, layer.kind, layer.pattern, shape, *numbers, kept, layer.note))
    for name, kind, shape, reason in left_rows(contexts, {layer.parameter for layer in layers}):
        rows.append((name, kind, "-", shape, "-", "-", "-", f"left: {reason}"))
    return Table("pruned layers", head, rows)
