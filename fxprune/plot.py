"""Pictures of reports by matplotlib, an optional package: ``report.plot("x.png")`` or ``.svg``."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.errors import ConfigError, MissingPackage

if TYPE_CHECKING:
    from fxprune.report import Table

_DENSE, _OURS = "#9aa4af", "#2f6fd0"
_LINES = 8  # curves of a picture at most


def plot(table: Table, path: str | Path) -> None:
    """Write a picture of a table: times by layer or by engine, sensitivity curves, or staircases.

    Raises :class:`~fxprune.errors.MissingPackage` without matplotlib and :class:`~fxprune.errors.ConfigError` for a table
    without numbers to draw.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackage(what="plot(path)", packages="matplotlib", extra="plot")
    from matplotlib.figure import Figure  # an optional package

    rows = table.to_dict()["rows"]
    draw = next((draw for needs, draw in _DRAWINGS if needs <= set(table.head)), None)
    if draw is None and any(re.fullmatch(r"0?\.\d+", name) for name in table.head):
        draw = _sensitivity
    if draw is None or not rows:
        expected = "a report of explain, benchmark, sensitivity or levels with at least one row"
        raise ConfigError(name="plot", given=table.title, expected=expected)
    figure = Figure(figsize=(9, 4), layout="constrained")
    draw(figure, rows)
    figure.suptitle(table.title)
    figure.savefig(path)


def _layers(figure: Any, rows: list[dict[str, Any]]) -> None:
    timed = [row for row in rows if row["dense us"] != "-"]
    figure.set_size_inches(9, max(3.0, 0.22 * len(timed) + 1.5))
    axes = figure.subplots()
    places = range(len(timed))
    ours = [float(row["dense us"] if row["kernel"] == "dense" else row["kernel us"]) for row in timed]
    axes.barh([p - 0.2 for p in places], [float(row["dense us"]) for row in timed], 0.4, color=_DENSE, label="dense")
    axes.barh([p + 0.2 for p in places], ours, 0.4, color=_OURS, label="hwprune")
    axes.set_yticks(list(places), [row["layer"] for row in timed], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("microseconds")
    axes.legend()


def _engines(figure: Any, rows: list[dict[str, Any]]) -> None:
    axes = figure.subplots()
    names, middle = [row["engine"] for row in rows], [float(row["median"]) for row in rows]
    low = [m - float(row["p10"]) for m, row in zip(middle, rows, strict=True)]
    high = [float(row["p90"]) - m for m, row in zip(middle, rows, strict=True)]
    axes.barh(names, middle, xerr=[[max(v, 0) for v in low], [max(v, 0) for v in high]], color=_OURS)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds per call, p10 to p90")


def _sensitivity(figure: Any, rows: list[dict[str, Any]]) -> None:
    axes = figure.subplots()
    columns = [name for name in rows[0] if re.fullmatch(r"0?\.\d+", name)]
    for row in rows[:_LINES]:
        axes.plot([float(c) for c in columns], [float(row[c]) for c in columns], marker="o", label=row["layer"])
    axes.set_xlabel("sparsity")
    axes.legend(fontsize=7)


def _levels(figure: Any, rows: list[dict[str, Any]]) -> None:
    axes = figure.subplots()
    layers: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        layers.setdefault(row["layer"], []).append(row)
    for layer, steps in sorted(layers.items(), key=lambda item: -float(item[1][0]["dense us"]))[:_LINES]:
        zeros = [float(step["sparsity"].rstrip("%")) / 100 for step in steps]
        axes.step(zeros, [float(step["kernel us"]) for step in steps], where="post", label=layer)
    axes.set_xlabel("sparsity")
    axes.set_ylabel("microseconds")
    axes.legend(fontsize=7)


_DRAWINGS = (
    ({"layer", "importance kept", "kernel us"}, _levels),
    ({"layer", "kernel", "kernel us", "dense us"}, _layers),
    ({"engine", "median", "p10", "p90"}, _engines),
)
