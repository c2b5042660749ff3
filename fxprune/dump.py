"""Numbered before and after graphs of every pass, as readable Python (``options={"dump": folder}``)."""

from __future__ import annotations

from pathlib import Path

from torch.fx import GraphModule


def text(gm: GraphModule) -> str:
    """Return a graph as the Python source torch.fx generates for it."""
    return str(gm.graph.python_code("self", verbose=False).src)


def write(folder: str, number: int, name: str, before: str, gm: GraphModule) -> None:
    """Write ``NN-name.before.py`` and ``NN-name.after.py``; unchanged graphs are written once."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    after = text(gm)
    if number == 0:
        (root / "00-captured.py").write_text(before)
    if after != before:
        (root / f"{number + 1:02d}-{name}.before.py").write_text(before)
        (root / f"{number + 1:02d}-{name}.after.py").write_text(after)
