"""Choose masks: what each layer is asked to lose, scored and selected by its pattern."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxprune.config import KINDS, Config
from fxprune.errors import NonFiniteWeight, UnknownLayer, UnknownPattern, nearest
from fxprune.importance import element_scores
from fxprune.match import Match
from fxprune.plan import lookup
from fxprune.sparsity import PATTERNS, get
from fxprune.sparsity.channel import within
from fxprune.sparsity.pattern import Ask, LayerMask

Gain = Callable[[str, int, int], float]


@dataclass(frozen=True)
class Choice:
    """What one parameter loses. layer: the mask of the matrix view; target: the sparsity asked for."""

    match: Match
    pattern: str
    layer: LayerMask
    target: float


def pattern_of(match: Match, config: Config) -> str:
    """Return the pattern name for a match; raises when it does not apply to the kind."""
    name = config.by_kind("pattern", match.kind) or "auto"
    legal = [p.name for p in PATTERNS if match.kind in p.kinds]
    if name == "auto":
        return legal[0]
    applies = match.kind in get(name).kinds
    if not applies and not isinstance(config.pattern, str):
        context = f" for {match.kind} layers"
        raise UnknownPattern(name=name, context=context, nearest=legal[0], legal=", ".join(legal))
    return name if applies else ""


def keeps_all(config: Config) -> bool:
    """True when what was asked for is n of n, which is a legal n:m and leaves weights dense."""
    names = config.pattern.values() if isinstance(config.pattern, Mapping) else [config.pattern]
    return not config.sparsity and any(name != "auto" and get(name).fixed == 0.0 for name in names)


def targets(matches: Sequence[Match], config: Config) -> dict[str, float]:
    """Return the sparsity asked of each layer, by parameter name; layers that stay dense are absent.

    Globs beat kinds, and a later glob beats an earlier one. Raises :class:`~fxprune.errors.UnknownLayer`.
    """
    wanted = config.sparsity
    if isinstance(wanted, Mapping):
        for key in wanted:
            _known(key, matches, "sparsity")
    for key in config.ignored_layers:
        _known(key, matches, "ignored_layers")
    result: dict[str, float] = {}
    for match in matches:
        if isinstance(wanted, Mapping):
            value = wanted.get(match.kind, 0.0)
            for key, given in wanted.items():
                if key not in KINDS and _hits(key, match):
                    value = given
        else:
            pattern = pattern_of(match, config) if wanted is None else ""
            value = wanted or (get(pattern).fixed if pattern else 0.0) or 0.0
        if any(_hits(key, match) for key in config.ignored_layers):
            continue
        if value and pattern_of(match, config):
            result[match.parameter] = float(value)
    return result


def choose_masks(
    matches: Sequence[Match],
    config: Config,
    unit: Callable[[str], Any],
    gain: Gain | None = None,
    scores: Mapping[str, Tensor] | None = None,
) -> dict[str, Choice]:
    """Return what each parameter loses, by parameter name.

    ``unit(kind)`` is the kernel row's granularity and steps, ``gain(parameter, kept, rounded)`` the measured time
    between two kept counts (HSR's alpha), ``scores`` what :func:`importances` returns. A parameter used twice is planned
    once.
    """
    asked = targets(matches, config)
    by_pattern: dict[str, dict[str, Match]] = {}
    for match in matches:
        if match.parameter in asked:
            by_pattern.setdefault(pattern_of(match, config), {}).setdefault(match.parameter, match)
    chosen: dict[str, Choice] = {}
    for pattern, layers in by_pattern.items():
        if pattern == "channel":  # coupled over layers: fxprune/channel_plan.py
            continue
        found = importances(list(layers.values()), config) if scores is None else {n: scores[n] for n in layers}
        share = {name: asked[name] for name in layers}
        kinds = {name: m.kind for name, m in layers.items()}
        groups = {name: m.geometry.groups for name, m in layers.items()}
        cut = {name: _live(m) for name, m in layers.items() if pattern == "tile" and groups[name] == 1}
        live = {name: kept for name, kept in cut.items() if kept is not None}
        for name, (rows, columns) in live.items():  # channels that are gone already are not planned again
            found[name] = found[name][rows][:, columns]
            share[name] = _share_of_rest(share[name], rows, columns)
        masks = get(pattern).choose(Ask(found, share, kinds, config, unit, gain, groups))
        for name, kept in live.items():
            masks[name] = within(layers[name].matrix_shape, *kept, masks[name])
        for name, mask in masks.items():
            chosen[name] = Choice(layers[name], pattern, mask, asked[name])
    return chosen


def importances(matches: Sequence[Match], config: Config) -> dict[str, Tensor]:
    """Return element scores of the matrix views, by parameter name."""
    return {match.parameter: importance(match, config) for match in matches}


def _live(match: Match) -> tuple[Tensor, Tensor] | None:
    """Return bool (N,) and (K,), the features a plan has not removed; ``None`` where all of them are left."""
    planned = lookup(match.value)
    if planned is None or not planned.mask.any():
        return None
    mask = match.matrix(planned.mask)
    rows, columns = mask.any(1), mask.any(0)
    return None if rows.all() and columns.all() else (rows, columns)


def _share_of_rest(share: float, rows: Tensor, columns: Tensor) -> float:
    """Return the sparsity asked of the remaining submatrix, so that the whole weight reaches ``share``."""
    rest = rows.float().mean().item() * columns.float().mean().item()
    return max(1.0 - (1.0 - share) / rest, 0.0)


def importance(match: Match, config: Config) -> Tensor:
    """Return the element scores of a match, in its matrix view."""
    weight = match.value.detach()
    if not math.isfinite(abs(weight.sum().item())):  # which is quick to say when all is well; a sum may also overflow
        broken = int((~torch.isfinite(weight)).sum())
        if broken:
            raise NonFiniteWeight(name=match.name, count=broken)
    return match.matrix(element_scores(match, config)).float().contiguous()


def _hits(key: str, match: Match) -> bool:
    return hits(key, match.name, match.parameter)


def hits(key: str, name: str, parameter: str) -> bool:
    """True when a glob names a layer or its weight, or the module that holds several."""
    return any(fnmatch.fnmatchcase(known, key) for known in (name, parameter, parameter.rpartition(".")[0]))


def _known(key: str, matches: Sequence[Match], option: str) -> None:
    if key in KINDS or any(_hits(key, match) for match in matches):
        return
    names = sorted({m.name for m in matches})
    close = nearest(key, [*KINDS, *names])
    raise UnknownLayer(name=key, option=option, nearest=close, kinds=", ".join(KINDS))
