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
from fxprune.channel_plan import Channels, Cut, choose_channels
from fxprune.config import KINDS, Config
from fxprune.context import Context
from fxprune.errors import ConfigError, NothingToPrune
from fxprune.lowering.kernels import KernelTables
from fxprune.lowering.measure import Measure
from fxprune.match import Match
from fxprune.plan import LayerPlan, Plan, PrunedWeight, lookup, register
from fxprune.planner import Choice, choose_masks, hits
from fxprune.report import Table
from fxprune.sparsity import dcp, refit
from fxprune.sparsity.pattern import LayerMask


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
    sparsity: fraction of zeros; a float, or a dict by kind ("depthwise", "pointwise", "linear") or layer glob. With the
        pattern "channel", the fraction of filters that go; the zeros in the weights are in the result.
    filter_fn: ``(module, fqn) -> bool``; layers it refuses stay as they are.
    options: fields of :class:`fxprune.Config`.

    Raises an error of :mod:`fxprune.errors` and changes nothing when the request makes no sense.
    Sources: DEPrune (NeurIPS 2024) Sec. 4-5 for ``dcp``, tile-wise sparsity (SC'20) for ``tile``.
    """
    config = Config.from_options({"sparsity": sparsity, **options})
    contexts = _contexts(model, example_inputs, config)
    matches = prunable(model, contexts, filter_fn)
    unit = KernelTables().unit
    chosen = choose_masks(matches, config, unit, _gain(matches, config))
    channels = choose_channels(contexts, matches, config, unit)
    if not chosen and not channels.cuts:
        raise _nothing(sparsity, matches, channels)
    target = model if inplace else copy.deepcopy(model)
    parameters = dict(target.named_parameters(remove_duplicate=False))
    if not inplace:
        _inherit(model, parameters)
    layers = [_apply(choice, parameters) for choice in chosen.values()]
    layers += [layer for cut in channels.cuts.values() if (layer := _apply_cut(cut, parameters, unit)) is not None]
    return PruneResult(target, Plan(layers), _achieved(layers, sparsity), _table(layers, channels))


def _contexts(model: nn.Module, example_inputs: Any, config: Config) -> list[Context]:
    if not isinstance(model, nn.Module):
        raise ConfigError(name="model", given=type(model).__name__, expected="a torch.nn.Module")
    return [detect(graph, config) for graph in capture(model, example_inputs)]


def prunable(
    model: nn.Module, contexts: Sequence[Context], filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> list[Match]:
    """Return the matches whose weight may be zeroed: a float parameter that nothing unmatched shares."""
    modules = dict(model.named_modules())
    found: list[Match] = []
    for ctx in contexts:
        matched = {m.node for m in ctx.matches}
        for match in ctx.matches:
            owner = match.parameter.rpartition(".")[0]  # "" when the model itself is the layer
            if owner not in modules or not isinstance(match.value, nn.Parameter) or _shared(match, matched):
                continue
            if filter_fn is None or filter_fn(modules[owner], match.name):
                found.append(match)
    if not found:
        raise NothingToPrune(
            reason=f"no depthwise, 1x1 or linear layer among the {len(contexts)} captured graph(s)",
            remedy="Supported kinds: " + ", ".join(KINDS) + ".",
        )
    return found


def _shared(match: Match, matched: set[Any]) -> bool:
    """True when something other than matched layers reads the weight (an embedding it is tied to)."""
    stack, seen = list(match.weight.users), set()
    while stack:
        node = stack.pop()
        if node in matched or node in seen:
            continue
        seen.add(node)
        if "transpose" in str(node.target) or "permute" in str(node.target) or str(node.target) in ("aten.t.default", "t"):
            stack.extend(node.users)
        else:
            return True
    return False


def _nothing(sparsity: Any, matches: list[Match], channels: Channels) -> NothingToPrune:
    if channels.skipped:
        why = "; ".join(f"{names}: {reason}" for names, reason in list(channels.skipped.items())[:3])
        return NothingToPrune(
            reason=f"no channel of {len(channels.skipped)} group(s) may go ({why})",
            remedy='Use pattern="tile", which keeps the channels.',
        )
    return NothingToPrune(
        reason=f"sparsity={sparsity!r} asks nothing of the {len(matches)} prunable layer(s) found",
        remedy="Run fxprune.explain(model, example_inputs) for the layers and their kinds.",
    )


def _inherit(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Attach to a copy what earlier calls pruned of ``model``."""
    for name, parameter in model.named_parameters():
        planned = lookup(parameter)
        if planned is not None:
            register(parameters[name], planned)


def _apply(choice: Choice, parameters: dict[str, nn.Parameter]) -> LayerPlan:
    match, layer = choice.match, choice.layer
    parameter = parameters[match.parameter]
    mask = match.restore(layer.mask).reshape(parameter.shape)
    written = _write(parameter, choice.pattern, layer, mask, match)
    return _layer_plan(match.name, match.parameter, match.kind, choice.target, written, layer.note)


def _apply_cut(cut: Cut, parameters: dict[str, nn.Parameter], unit: Callable[[str], Any]) -> LayerPlan | None:
    """Zero the channels of one parameter; a vector (bias, BatchNorm) is held at zero and not reported."""
    parameter, match = parameters[cut.parameter], cut.match
    kind = "conv" if match is None else match.kind
    layer = cut.layer(unit("pointwise" if match is None else match.kind).granularity)
    written = _write(parameter, "channel", layer, cut.mask, match)
    if parameter.dim() == 1:
        return None
    name = cut.parameter.rpartition(".")[0]
    return _layer_plan(name, cut.parameter, kind, cut.target, written, cut.note())


@torch.no_grad()
def _write(parameter: nn.Parameter, pattern: str, layer: LayerMask, mask: torch.Tensor, match: Match | None) -> PrunedWeight:
    """Write zeros and register the mask, together with that of an earlier call; returns what was registered."""
    before = lookup(parameter)
    if before is not None:
        if pattern not in before.pattern.split("+"):
            pattern = f"{before.pattern}+{pattern}"
        if (mask & ~before.mask).any():
            mask = mask & before.mask
            matrix = mask.reshape(len(mask), -1) if match is None else match.matrix(mask)
            depthwise = match is not None and match.kind == "depthwise"
            layer = refit(matrix, layer.tiling.granularity, depthwise)
    parameter.masked_fill_(~mask, 0)
    pruned = PrunedWeight(pattern, layer, mask)
    register(parameter, pruned)
    return pruned


def _layer_plan(name: str, parameter: str, kind: str, target: float, pruned: PrunedWeight, note: str) -> LayerPlan:
    layer, mask = pruned.layer, pruned.mask
    every = len(layer.tiling.columns) == layer.tiling.shape[0]
    return LayerPlan(
        name=name,
        parameter=parameter,
        kind=kind,
        pattern=pruned.pattern,
        shape=tuple(mask.shape),
        target=target,
        sparsity=1.0 - mask.float().mean().item(),
        granularity=layer.tiling.granularity,
        counts=tuple(layer.counts),
        columns=None if every else tuple(layer.tiling.columns.tolist()),
        note=note,
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


def _table(layers: list[LayerPlan], channels: Channels) -> Table:
    head = ("layer", "kind", "pattern", "shape", "target", "sparsity", "kept per tile", "note")
    rows = []
    for layer in layers:
        kept = f"{min(layer.counts)}..{max(layer.counts)}" if layer.counts else "-"
        shape = "x".join(map(str, layer.shape))
        numbers = (f"{layer.target:.1%}", f"{layer.sparsity:.1%}")
        rows.append((layer.name, layer.kind, layer.pattern, shape, *numbers, kept, layer.note))
    summary = {}
    if channels.cuts:
        share = channels.removed / channels.total
        summary["channels"] = (
            f"{channels.removed} of {channels.total} filters of {channels.groups} group(s) removed ({share:.1%})"
        )
    for reason in dict.fromkeys(channels.skipped.values()):
        names = [name for name, why in channels.skipped.items() if why == reason]
        summary[f"keep all filters ({reason})"] = "; ".join(names)
    return Table("pruned layers", head, rows, summary)
