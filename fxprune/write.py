"""Write a decision into a model: refitted values, zeros, and the masks that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.channel_plan import Channels
from fxprune.compensate import Refit, write_refit
from fxprune.match import Match
from fxprune.plan import LayerPlan, PrunedWeight, lookup, register, tiles
from fxprune.planner import Choice
from fxprune.sparsity import refit
from fxprune.sparsity.pattern import LayerMask, share


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
    layers = []
    for wanted in wishes(decided, unit):
        parameter = parameters[wanted.parameter]
        pruned = _zero(parameter, wanted)
        if (layer := wanted.layer_plan(pruned)) is not None:
            layers.append(layer)
    return layers


@dataclass(frozen=True)
class Wish:
    """What one parameter is to lose. mask: kept elements, of the parameter's shape; layer: the same in its matrix view.

    match: ``None`` for a parameter that only follows others (biases, BatchNorm).
    """

    parameter: str
    name: str
    kind: str
    pattern: str
    layer: LayerMask
    mask: Tensor
    target: float
    note: str
    match: Match | None

    def layer_plan(self, pruned: PrunedWeight) -> LayerPlan | None:
        """Return the row of the plan; a vector is held at zero and not reported."""
        if self.mask.dim() == 1:
            return None
        return LayerPlan(
            name=self.name,
            parameter=self.parameter,
            kind=self.kind,
            pattern=pruned.pattern,
            shape=tuple(pruned.mask.shape),
            target=self.target,
            sparsity=1.0 - share(pruned.mask),
            note=self.note,
            **tiles(pruned.layer),
        )


def wishes(decided: Decided, unit: Callable[[str], Any]) -> Iterator[Wish]:
    """Yield what a decision takes from each parameter."""
    for choice in decided.choices.values():
        match, layer = choice.match, choice.layer
        mask = match.restore(layer.mask).reshape(match.value.shape)
        names = (match.parameter, match.name, match.kind, choice.pattern)
        yield Wish(*names, layer, mask, choice.target, layer.note, match)
    for cut in decided.channels.cuts.values():
        kind = "conv" if cut.match is None else cut.match.kind
        layer = cut.layer(unit(kind).granularity)
        names = (cut.parameter, cut.parameter.rpartition(".")[0], kind, "channel")
        yield Wish(*names, layer, cut.mask, cut.target, cut.note(), cut.match)


def _inherit(model: nn.Module, parameters: dict[str, nn.Parameter]) -> None:
    """Attach to a copy what earlier calls pruned of ``model``."""
    for name, parameter in model.named_parameters():
        planned = lookup(parameter)
        if planned is not None:
            register(parameters[name], planned)


@torch.no_grad()
def _zero(parameter: nn.Parameter, wanted: Wish) -> PrunedWeight:
    """Write zeros and register the mask, together with that of an earlier call; returns what was registered."""
    pattern, layer, mask, match = wanted.pattern, wanted.layer, wanted.mask, wanted.match
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
