"""Write a decision into a model: refitted values, zeros, and the masks that hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.channel_plan import Channels, Cut
from fxprune.compensate import Refit, write_refit
from fxprune.match import Match
from fxprune.plan import LayerPlan, PrunedWeight, lookup, register
from fxprune.planner import Choice
from fxprune.sparsity import refit
from fxprune.sparsity.pattern import LayerMask


@dataclass(frozen=True)
class Decided:
    """What one call of ``prune`` writes. choices: masks by parameter. channels: filters that go. refits: new values."""

    choices: Mapping[str, Choice] = field(default_factory=dict)
    channels: Channels = field(default_factory=Channels)
    refits: Mapping[str, Refit] = field(default_factory=dict)


def write(target: nn.Module, decided: Decided, unit: Callable[[str], Any], source: nn.Module) -> list[LayerPlan]:
    """Change ``target`` in place and return a plan per layer. source: the model it is a copy of, or itself."""
    parameters = dict(target.named_parameters(remove_duplicate=False))
    if target is not source:
        _inherit(source, parameters)
    for name, values in decided.refits.items():
        write_refit(decided.choices[name].match, values, parameters)
    layers = [_apply(choice, parameters) for choice in decided.choices.values()]
    cuts = [_apply_cut(cut, parameters, unit) for cut in decided.channels.cuts.values()]
    return layers + [layer for layer in cuts if layer is not None]


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
    written = _zero(parameter, choice.pattern, layer, mask, match)
    return _layer_plan(match.name, match.parameter, match.kind, choice.target, written, layer.note)


def _apply_cut(cut: Cut, parameters: dict[str, nn.Parameter], unit: Callable[[str], Any]) -> LayerPlan | None:
    """Zero the channels of one parameter; a vector (bias, BatchNorm) is held at zero and not reported."""
    parameter, match = parameters[cut.parameter], cut.match
    kind = "conv" if match is None else match.kind
    layer = cut.layer(unit(kind).granularity)
    written = _zero(parameter, "channel", layer, cut.mask, match)
    if parameter.dim() == 1:
        return None
    name = cut.parameter.rpartition(".")[0]
    return _layer_plan(name, cut.parameter, kind, cut.target, written, cut.note())


@torch.no_grad()
def _zero(parameter: nn.Parameter, pattern: str, layer: LayerMask, mask: Tensor, match: Match | None) -> PrunedWeight:
    """Write zeros and register the mask, together with that of an earlier call; returns what was registered."""
    before = lookup(parameter)
    if before is not None:
        if pattern not in before.pattern.split("+"):
            pattern = f"{before.pattern}+{pattern}"
        if (mask & ~before.mask).any():
            mask = mask & before.mask
            matrix = mask.reshape(len(mask), -1) if match is None else match.matrix(mask)
            layer = refit(matrix, layer.tiling.granularity, *_shape(match))
    parameter.masked_fill_(~mask, 0)
    pruned = PrunedWeight(pattern, layer, mask)
    register(parameter, pruned)
    return pruned


def _shape(match: Match | None) -> tuple[bool, bool]:
    """Return whether a weight is depthwise, and whether whole output features of it may go."""
    return match is not None and match.kind == "depthwise", match is None or match.geometry.groups == 1


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
