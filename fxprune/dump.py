"""Numbered before and after graphs of every pass, as Python files that run (``options={"dump": folder}``).

``folder/graph-1`` holds the first graph that this process compiled with that folder: ``00-captured.py``, for each pass that
changed something ``NN-name.before.py`` and ``NN-name.after.py``, and ``tensors.pt`` with the tensors of them all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.graph_module import _format_import_block
from torch.package import sys_importer

from fxprune.context import Context
from fxprune.graph import example

_TENSORS = "tensors.pt"
_GRAPHS: dict[Path, int] = {}  # graphs written by this process
_FRAME = '''"""{title} Run it: python {file}"""

{imports}
from fxprune import dump

{body}


if __name__ == "__main__":
    print(dump.run(forward, __file__))
'''


class Dump:
    """Observer of a pipeline (:meth:`Context.observe`): writes the graphs of one compile."""

    def __init__(self, folder: str, inputs: tuple[Any, ...] = ()) -> None:
        root = Path(folder).resolve()
        _GRAPHS[root] = _GRAPHS.get(root, 0) + 1
        self._folder = root / f"graph-{_GRAPHS[root]}"
        self._folder.mkdir(parents=True, exist_ok=True)
        for stale in self._folder.glob("[0-9][0-9]-*.py"):
            stale.unlink()
        self._inputs = inputs
        self._source = ""
        self._values: dict[str, Any] = {}

    def __call__(self, number: int, name: str, gm: GraphModule, ctx: Context) -> None:
        code = gm.graph.python_code("self")
        imports = _format_import_block(code.globals, sys_importer)
        source = f"{imports}\0{code.src.strip()}"
        if source == self._source:
            return
        if number == 0:
            self._write("00-captured.py", "The graph as it was captured.", source)
        else:
            self._write(f"{number:02d}-{name}.before.py", f"The graph before the pass {name}.", self._source)
            self._write(f"{number:02d}-{name}.after.py", f"The graph after the pass {name}.", source)
        self._source = source
        self._values |= self._now(gm, ctx)
        torch.save(self._values, self._folder / _TENSORS)

    def _write(self, file: str, title: str, source: str) -> None:
        imports, _, body = source.partition("\0")
        (self._folder / file).write_text(_FRAME.format(title=title, file=file, imports=imports.strip(), body=body))

    def _now(self, gm: GraphModule, ctx: Context) -> dict[str, Any]:
        """Return the arguments and attributes of the graph by name; arguments that are not known are zeros."""
        found: dict[str, Any] = {}
        given = iter(self._inputs)
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                weight, value = ctx.weights.value(node), next(given, example(node))
                found[str(node.target)] = _plain(value if weight is None else weight)
            elif node.op == "get_attr" and (weight := ctx.weights.value(node)) is not None:
                found[str(node.target)] = _plain(weight)
        return found


def _plain(value: Any) -> Any:
    """Return a value to save: a plain tensor, or the number that a symbol stands for."""
    if isinstance(value, torch._subclasses.FakeTensor):
        return torch.zeros([_plain(size) for size in value.shape], dtype=value.dtype)
    if isinstance(value, Tensor):
        return value.detach()
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat)) else value


def run(forward: Callable[..., Any], file: str) -> Any:
    """Call the ``forward`` of a dumped graph with the tensors beside ``file``, without gradients."""
    values = torch.load(Path(file).with_name(_TENSORS), weights_only=True)
    owner = SimpleNamespace()
    for name, value in values.items():
        *path, last = name.split(".")
        place = owner
        for part in path:
            place = place.__dict__.setdefault(part, SimpleNamespace())
        setattr(place, last, value)
    _, *arguments = inspect.signature(forward).parameters
    with torch.no_grad():
        return forward(owner, *[values[name] for name in arguments])
