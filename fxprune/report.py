"""A table that prints, and turns into a dict, JSON or markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Table:
    """Rows under a head, with summary lines below."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]
    summary: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        rows = [dict(zip(self.head, row, strict=True)) for row in self.rows]
        return {"title": self.title, "rows": rows, "summary": dict(self.summary)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, default=str)

    def to_markdown(self) -> str:
        lines = ["| " + " | ".join(self.head) + " |", "|" + " --- |" * len(self.head)]
        lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in self.rows]
        return "\n".join(lines + [""] + [f"- {key}: {value}" for key, value in self.summary.items()])

    def plot(self, path: str | Path) -> None:
        """Write a PNG or SVG, by the ending of ``path``; needs the extra ``fxprune[plot]``."""
        from fxprune.plot import plot  # which needs matplotlib

        plot(self, path)

    def __str__(self) -> str:
        cells = [self.head, *[tuple(str(c) for c in row) for row in self.rows]]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.head))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
        lines.insert(1, "  ".join("-" * w for w in widths))
        return "\n".join([self.title, *lines, *[f"{key}: {value}" for key, value in self.summary.items()]])
