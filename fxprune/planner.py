"""Choose masks: what each layer is asked to lose, scored and selected by its pattern."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxprune.config import KINDS, Config
from fxprune.errors import ConfigError, NonFiniteWeight, UnknownLayer, UnknownPattern, nearest
from fxprune.match import Match
from fxprune.plan import lookup
from fxprune.sparsity import PATTERNS, channel, dcp, tile
from fxprune.sparsity.pattern import LayerMask

Gain = Callable[[str, int, int], float]

_TOLERANCE = 0.005  # of the weights: how far the achieved sparsity of a model may be from what was asked


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
    if name not in [p.name for p in PATTERNS]:
        raise UnknownPattern(name=name, context="", nearest=nearest(name, legal), legal=", ".join(legal))
    if name not in legal and not isinstance(config.pattern, str):
        context = f" for {match.kind} layers"
        raise UnknownPattern(name=name, context=context, nearest=legal[0], legal=", ".join(legal))
    return name if name in legal else ""


def targets(matches: Sequence[Match], config: Config) -> dict[str, float]:
    """Return the sparsity asked of each layer, by parameter name; layers that stay dense are absent.

    Globs beat kinds, and a later glob beats an earlier one. Raises :class:`~fxprune.errors.UnknownLayer`.
    """
    wanted = config.sparsity
    names = sorted({m.name for m in matches})
    if isinstance(wanted, Mapping):
        for key in wanted:
            _known(key, names, "sparsity")
    for key in config.ignored_layers:
        _known(key, names, "ignored_layers")
    result: dict[str, float] = {}
    for match in matches:
        if isinstance(wanted, Mapping):
            value = wanted.get(match.kind, 0.0)
            for key, given in wanted.items():
                if key not in KINDS and _hits(key, match):
                    value = given
        else:
            value = wanted or 0.0
        if any(_hits(key, match) for key in config.ignored_layers):
            continue
        if value and pattern_of(match, config):
            result[match.parameter] = float(value)
    return result


def choose_masks(
    matches: Sequence[Match], config: Config, unit: Callable[[str], Any], gain: Gain | None = None
) -> dict[str, Choice]:
    """Return what each parameter loses, by parameter name.

    ``unit(kind)`` is the kernel row's granularity and steps, ``gain(parameter, kept, rounded)`` the measured time
    between two kept counts (HSR's alpha). A parameter used twice is planned once.
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
        importances = {name: importance(m, config) for name, m in layers.items()}
        share = {name: asked[name] for name in layers}
        if pattern == "dcp":
            masks = _tap_masks(importances, share, config, unit("depthwise").k_step, gain)
        else:
            masks = _tile_masks(layers, importances, share, config, unit)
        for name, mask in masks.items():
            chosen[name] = Choice(layers[name], pattern, mask, share[name])
    return chosen


def _tap_masks(
    importances: dict[str, Tensor], share: dict[str, float], config: Config, step: int, gain: Gain | None
) -> dict[str, LayerMask]:
    """Recalibrate with the paper's tile, or with the largest half of it that meets the target.

    A whole network meets it at once; one small layer has too few taps for multiples of 32 per group.
    """
    tile = dcp.GROUP
    wanted = sum((1.0 - share[name]) * scores.numel() for name, scores in importances.items())
    total = max(sum(scores.numel() for scores in importances.values()), 1)
    while True:
        masks = dcp.plan_layers(
            importances,
            share,
            group=config.group,
            balance=config.balance,
            recalibrate=config.recalibrate,
            tile=tile,
            gain=gain if config.recalibrate == "auto" else None,
        )
        kept = sum(int(layer.mask.sum()) for layer in masks.values())
        if abs(kept - wanted) <= _TOLERANCE * total or tile // 2 < step or config.recalibrate == "off":
            return masks
        tile //= 2


def _tile_masks(
    layers: dict[str, Match],
    importances: dict[str, Tensor],
    share: dict[str, float],
    config: Config,
    unit: Callable[[str], Any],
) -> dict[str, LayerMask]:
    masks: dict[str, LayerMask] = {}
    for kind in ("pointwise", "linear"):
        names = [n for n, m in layers.items() if m.kind == kind]
        live = {n: _live(layers[n]) for n in names}  # channels that are gone already are not planned again
        if not names:
            continue
        row = unit(kind)
        columns = config.by_kind("columns", kind)
        recalibrate = config.recalibrate != "off"
        planned = tile.plan_layers(
            {n: importances[n][rows][:, cols] for n, (rows, cols) in live.items()},
            {n: _share_of_rest(share[n], *live[n]) for n in names},
            granularity=config.by_kind("granularity", kind) or row.granularity,
            columns=kind == "linear" if columns is None else columns,
            scope=config.scope,
            ranking=config.ranking,
            step=row.k_step if recalibrate else 1,
            column_step=row.column_step if recalibrate else None,
        )
        masks.update({n: channel.within(layers[n].matrix_shape, *live[n], mask) for n, mask in planned.items()})
    return masks


def _live(match: Match) -> tuple[Tensor, Tensor]:
    """Return bool (N,) and (K,): the features a plan has not removed; all of them of a weight without a plan."""
    planned = lookup(match.value)
    if planned is None or not planned.mask.any():
        n, k = match.matrix_shape
        return torch.ones(n, dtype=torch.bool), torch.ones(k, dtype=torch.bool)
    mask = match.matrix(planned.mask)
    return mask.any(1), mask.any(0)


def _share_of_rest(share: float, rows: Tensor, columns: Tensor) -> float:
    """Return the sparsity asked of the remaining submatrix, so that the whole weight reaches ``share``."""
    rest = rows.float().mean().item() * columns.float().mean().item()
    return max(1.0 - (1.0 - share) / rest, 0.0)


def importance(match: Match, config: Config) -> Tensor:
    """Return the element scores of a match, in its matrix view."""
    weight = match.value.detach()
    finite = torch.isfinite(weight)
    if not finite.all():
        raise NonFiniteWeight(name=match.name, count=int((~finite).sum()))
    if callable(config.importance):
        scores = config.importance(match.name, weight)
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ConfigError(name="importance", given=given, expected=f"a tensor of shape {tuple(weight.shape)}")
    else:
        scores = weight.abs()
    return match.matrix(scores).float().contiguous()


def _hits(key: str, match: Match) -> bool:
    return hits(key, match.name, match.parameter)


def hits(key: str, name: str, parameter: str) -> bool:
    """True when a glob names a layer or its weight."""
    return fnmatch.fnmatchcase(name, key) or fnmatch.fnmatchcase(parameter, key)


def _known(key: str, names: list[str], option: str) -> None:
    if key in KINDS or any(fnmatch.fnmatchcase(n, key) or fnmatch.fnmatchcase(n + ".weight", key) for n in names):
        return
    close = nearest(key, [*KINDS, *names])
    raise UnknownLayer(name=key, option=option, nearest=close, kinds=", ".join(KINDS))
