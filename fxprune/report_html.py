"""One self-contained page of what was decided, measured and pruned: no network, sortable, for dark screens and phones."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxprune import charts, page
from fxprune.config import KINDS
from fxprune.plan import Plan, PrunedWeight
from fxprune.report import Table
from fxprune.sparsity import dcp
from fxprune.sparsity.pattern import share
from fxprune.stages import Stage

_MOST = 24  # pictures of masks and of levels: the largest
_NUMERIC = ' class="n"'
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?=[%x]?$)")


def write(
    path: str | Path,
    *,
    title: str = "fxprune",
    explain: Table | None = None,
    benchmark: Table | None = None,
    sensitivity: Table | None = None,
    levels: Table | None = None,
    plan: Plan | None = None,
    dense: nn.Module | None = None,
    stages: Sequence[Sequence[Stage]] = (),
) -> None:
    """Write a page of the tables that :func:`fxprune.explain` and its neighbours return, and of the masks of a plan.

    dense: the model before pruning; with it depthwise masks are shown before and after balancing and recalibration.
    stages: the graphs before and after each pass, of :func:`fxprune.stages`.
    """
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if benchmark is not None:
        parts += [_section("Whole model"), _table(benchmark)]
    if explain is not None:
        parts += [_section("Where the time goes"), _times(explain), _section("Layers"), _table(explain), _summary(explain)]
    if levels is not None:
        parts += [_section("What each layer could lose"), _levels(levels, explain)]
    if plan is not None and plan.weights:
        parts += [_section("Masks"), _masks(plan, dense)]
    if sensitivity is not None:
        parts += [_section("Sensitivity"), _sensitivity(sensitivity), _table(sensitivity), _summary(sensitivity)]
    for number, graph in enumerate(stages, 1):
        parts += [_section("Graph" if len(stages) == 1 else f"Graph {number} of {len(stages)}"), _graph(graph)]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
    head += f'<meta name="color-scheme" content="light dark"><title>{html.escape(title)}</title><style>{page.STYLE}</style>'
    body = f"{''.join(parts)}<script>{page.SCRIPT}</script>"
    text = f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'
    Path(path).write_text(text, encoding="utf-8")


def _section(text: str) -> str:
    return f"<h2>{html.escape(text)}</h2>"


def _times(explain: Table) -> str:
    """Two bars, one scale: every timed layer dense, and as it was decided."""
    dense, ours = [], []
    for row in explain.to_dict()["rows"]:
        if row["dense us"] == "-":
            continue
        micros = float(row["dense us"])
        dense.append((row["layer"], row["kind"], micros))
        kept = row["kernel"] == "dense"
        ours.append((row["layer"], row["kind"], micros if kept else float(row["kernel us"])))
    if not dense:
        return "<p>No layer was timed: nothing is pruned, or no kernel runs what is.</p>"
    whole, left = (sum(part[2] for part in parts) for parts in (dense, ours))
    kinds = [kind for kind in KINDS if any(part[1] == kind for part in dense)]
    legend = "".join(f'<span><i class="k-{kind}"></i>{kind}</span>' for kind in kinds)
    return (
        f"<div>dense <b>{whole:.0f} us</b></div>{charts.stacked(dense, whole)}"
        f"<div>hwprune <b>{left:.0f} us</b>, {whole / max(left, 1e-9):.2f}x</div>{charts.stacked(ours, whole)}"
        f'<div class="legend">{legend}</div><p>Layers timed alone, by kind; point at one for its name.</p>'
    )


def _table(table: Table) -> str:
    rows = table.to_dict()["rows"]
    first = rows[0] if rows else {}
    head = "".join(
        f'<th scope="col"{_NUMERIC if _NUMBER.match(str(first.get(name))) else ""}>'
        f'<button type="button">{html.escape(name)}</button></th>'
        for name in table.head
    )
    body = []
    for row in rows:
        chosen = ' class="chosen"' if row.get("kernel", "dense") != "dense" else ""
        kind = html.escape(str(row.get("kind", "")))
        body.append(f'<tr{chosen} data-kind="{kind}">{"".join(_td(value) for value in row.values())}</tr>')
    kinds = sorted({str(row["kind"]) for row in rows if "kind" in row})
    options = "".join(f"<option>{html.escape(kind)}</option>" for kind in kinds)
    select = f'<select aria-label="kind"><option value="">all kinds</option>{options}</select>' if kinds else ""
    only = '<label><input type="checkbox"> chosen only</label>' if "kernel" in table.head else ""
    return (
        '<section class="table"><div class="controls"><input type="search" placeholder="filter" aria-label="filter">'
        f'{select}{only}<output></output></div><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _td(value: Any) -> str:
    text = str(value)
    number = _NUMBER.match(text)
    key = number.group() if number else "" if text == "-" else text
    kind = ' class="n"' if number else ' class="long"' if len(text) > 28 else ""
    return f'<td{kind} data-v="{html.escape(key)}">{html.escape(text)}</td>'


def _summary(table: Table) -> str:
    entries = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in table.summary.items())
    return f"<dl>{entries}</dl>" if entries else ""


def _levels(levels: Table, explain: Table | None) -> str:
    """A staircase per layer, the slowest first, with the count that was chosen."""
    stairs: dict[str, list[dict[str, Any]]] = {}
    for row in levels.to_dict()["rows"]:
        stairs.setdefault(row["layer"], []).append(row)
    rows = explain.to_dict()["rows"] if explain is not None else []
    chosen = {row["layer"]: row for row in rows if row["kernel"] != "dense" and row["kernel us"] != "-"}
    figures = []
    for layer, steps in sorted(stairs.items(), key=lambda item: -float(item[1][0]["dense us"]))[:_MOST]:
        points = [(_share(step["sparsity"]), float(step["kernel us"])) for step in steps]
        row = chosen.get(layer)
        marks = [(_share(row["sparsity"]), float(row["kernel us"]))] if row else []
        picture = charts.lines(
            {layer: points}, f"microseconds of {layer} over sparsity", True, marks, float(steps[0]["dense us"])
        )
        text = f"<b>{html.escape(layer)}</b> us over zeros; dashed: dense" + ("; dot: chosen" if marks else "")
        figures.append(f"<figure>{picture}<figcaption>{text}</figcaption></figure>")
    return f'<div class="grid">{"".join(figures)}</div>'


def _masks(plan: Plan, dense: nn.Module | None) -> str:
    weights = sorted(((n, w) for n, w in plan.weights.items() if w.mask.dim() > 1), key=lambda item: -item[1].mask.numel())
    depthwise = [item for item in weights if item[1].pattern == "dcp"][: _MOST // 2]
    shown = depthwise + [item for item in weights if item[1].pattern != "dcp"][: _MOST - len(depthwise)]
    parameters = {} if dense is None else dict(dense.named_parameters(remove_duplicate=False))
    figures = []
    for name, pruned in shown:
        n, k = pruned.layer.tiling.shape
        zeros = 1 - share(pruned.mask)
        before = _depthwise(name, pruned, parameters) if name in parameters and pruned.pattern == "dcp" else []
        pictures = [*before, ("kept" if not before else "HSR: recalibrated", pruned.layer.mask)]
        images = "".join(
            f'<span class="mask"><img alt="{label}" src="{charts.mask_png(mask)}">{label if before else ""}</span>'
            for label, mask in pictures
        )
        size = f"{n} x {k}, tiles of {pruned.layer.tiling.granularity}, {zeros:.1%} zeros"
        text = f"<b>{html.escape(name)}</b> {html.escape(pruned.pattern)} {size}"
        figures.append(f"<figure>{images}<figcaption>{text}</figcaption></figure>")
    intro = f"<p>Rows are output features or channels, dark is kept; the {len(shown)} largest.</p>"
    return f'{intro}<div class="grid">{"".join(figures)}</div>'


def _depthwise(name: str, pruned: PrunedWeight, parameters: dict[str, nn.Parameter]) -> list[tuple[str, torch.Tensor]]:
    """The masks on the way to a balanced, recalibrated one, at the same sparsity (DEPrune, Sec. 4.2 and 5.1)."""
    zeros, scores = 1 - share(pruned.mask), parameters[name].detach().abs().reshape(pruned.layer.mask.shape)
    group = pruned.layer.tiling.granularity
    stages = (("DCP: smallest taps", False), ("BWT: equal per group", True))
    plans = [dcp.plan_layers({name: scores}, {name: zeros}, group=group, balance=b, recalibration="off") for _, b in stages]
    return [(label, made[name].mask) for (label, _), made in zip(stages, plans, strict=True)]


def _sensitivity(table: Table) -> str:
    """One curve per layer, the most sensitive six in colour."""
    columns = [name for name in table.head if re.fullmatch(r"0?\.\d+", name)]
    rows: Sequence[dict[str, Any]] = table.to_dict()["rows"][:6]
    series = {str(row["layer"]): [(float(c), float(row[c])) for c in columns] for row in rows}
    if not series:
        return ""
    dash = '<svg width="14" height="8"><polyline class="c{}" points="0,4 14,4"/></svg>'
    names = "".join(f"<span>{dash.format(i)}{html.escape(name)}</span>" for i, name in enumerate(series))
    curves = charts.lines(series, "sensitivity over sparsity")
    return f'<figure class="curves">{curves}<div class="legend">{names}</div></figure>'


def _share(text: str) -> float:
    return float(text.rstrip("%")) / 100


def _graph(stages: Sequence[Stage]) -> str:
    """A folded part per pass: what is gone and new among the lines around it, or every line."""
    parts = []
    for stage in stages:
        gone, new = stage.counts
        counts = f'<span class="gone">-{gone}</span> <span class="new">+{new}</span>'
        what = counts if gone or new else f"{len(stage.after)} nodes"
        body = "".join(
            f"<code{'' if sign == ' ' else f' data-c={chr(34)}{sign}{chr(34)}'}>{html.escape(text)}</code>"
            for sign, text in stage.changes()
        )
        title = f"{stage.number} <b>{html.escape(stage.name)}</b> {what}"
        parts.append(f"<details><summary>{title}</summary><pre>{body}</pre></details>")
    return (
        '<section class="graph"><p>Passes that changed the graph. Red lines are gone, green ones are new.</p>'
        '<div class="controls"><input type="search" placeholder="find a node" aria-label="find a node">'
        f'<label><input type="checkbox"> all lines</label><output></output></div>{"".join(parts)}</section>'
    )
