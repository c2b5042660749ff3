"""What a call of ``prune`` reports: achieved sparsity, and a row per layer, those it left included."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from fxprune.channel_plan import Channels
from fxprune.context import Context
from fxprune.left import left_rows
from fxprune.plan import LayerPlan
from fxprune.planner import hits
from fxprune.report import Table
from fxprune.search import Search
from fxprune.target import Speed
from fxprune.write import Decided


def achieved(layers: list[LayerPlan], asked: float | Mapping[str, float] | None) -> dict[str, float]:
    """Return the element-weighted sparsity by the keys asked for, and by kind."""
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


def table(
    layers: list[LayerPlan],
    decided: Decided,
    contexts: Sequence[Context],
    search: Search | None,
    speed: Speed | None,
) -> Table:
    """Return the pruned layers, then those found but left, each with the reason."""
    head: tuple[str, ...] = ("layer", "kind", "pattern", "shape", "target", "sparsity", "kept per tile", "note")
    if decided.refits:
        head += ("output error", "refitted")
    rows = []
    for layer in layers:
        kept = f"{min(layer.counts)}..{max(layer.counts)}" if layer.counts else "-"
        shape = "x".join(map(str, layer.shape))
        numbers = (f"{layer.target:.1%}", f"{layer.sparsity:.1%}")
        row: tuple[str, ...] = (layer.name, layer.kind, layer.pattern, shape, *numbers, kept, layer.note)
        if decided.refits:
            values = decided.refits.get(layer.parameter)
            row += (f"{values.before:.2%}", f"{values.after:.2%}") if values else ("-", "not recorded")
        rows.append(row)
    for name, kind, shape, reason in left_rows(contexts, {layer.parameter for layer in layers}):
        rows.append((name, kind, "-", shape, "-", "-", "-", f"left: {reason}", *["-"] * (len(head) - 8)))
    summary = {**_channels(decided.channels), **(search.summary() if search else {})}
    if speed is not None:
        summary |= {"speed": speed, "retained": f"{speed.retained:.1%}"}
    return Table("pruned layers", head, rows, summary)


def _channels(channels: Channels) -> dict[str, Any]:
    summary = {}
    if channels.cuts:
        share = channels.removed / channels.total
        summary["channels"] = (
            f"{channels.removed} of {channels.total} filters of {channels.groups} group(s) removed ({share:.1%})"
        )
    for reason in dict.fromkeys(channels.skipped.values()):
        names = [name for name, why in channels.skipped.items() if why == reason]
        summary[f"keep all filters ({reason})"] = "; ".join(names)
    return summary
