"""The graph after each pass as lines to read, and what a pass changed of them."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxprune.context import Context
from fxprune.graph import example, name_of
from fxprune.ops import region
from fxprune.weights import qualified_name

Line = tuple[str, str]  # " " as before, "-" gone, "+" new; and the text


@dataclass(frozen=True)
class Stage:
    """One pass that changed a graph: ``before`` and ``after`` are a line per node. Number 0 is the graph as captured."""

    number: int
    name: str
    before: tuple[str, ...]
    after: tuple[str, ...]

    def changes(self) -> list[Line]:
        """Return the lines of both graphs in order, with what is gone in front of what took its place."""
        return list(self._merged)

    @cached_property
    def _merged(self) -> tuple[Line, ...]:
        return tuple(_merged(self.before, self.after))

    @property
    def counts(self) -> tuple[int, int]:
        """Return how many lines are gone and how many are new."""
        signs = [sign for sign, _ in self._merged]
        return signs.count("-"), signs.count("+")


class Stages:
    """Observer of a pipeline (:meth:`Context.observe`): keeps a stage for each pass that changed the graph."""

    def __init__(self) -> None:
        self.kept: list[Stage] = []

    def __call__(self, number: int, name: str, gm: GraphModule, ctx: Context) -> None:
        after = lines(gm)
        before = self.kept[-1].after if self.kept else after
        if not self.kept or after != before:
            self.kept.append(Stage(number, name, before, after))


def lines(gm: GraphModule) -> tuple[str, ...]:
    """Return ``name (shape) dtype = operator(arguments)`` for each node that computes; weights go by their names."""
    return tuple(line for node in gm.graph.nodes if node.op not in ("placeholder", "get_attr") for line in _lines(node))


def _lines(node: Node) -> Iterator[str]:
    """One line; of a region one more for each step of its program."""
    if node.op == "output":
        yield f"return {_text(node.args[0])}"
    elif node.target is torch.ops.fxprune.region.default:
        x, _, _, program, outputs = node.args
        steps = region.describe(region.numbers(program)).splitlines()  # type: ignore[arg-type]
        names = ", ".join(node.meta[region.PARTS])
        yield f"{node.name} = fxprune.region({_text(x)}, [{names}], {len(steps)} steps, {outputs})"
        yield from (f"    {step}" for step in steps)
    else:
        yield _line(node)


def _line(node: Node) -> str:
    given = [_text(a) for a in node.args] + [f"{key}={_text(value)}" for key, value in node.kwargs.items()]
    target = str(node.target) if node.op in ("call_method", "call_module") else _target(node)
    return f"{node.name}{_type(example(node))} = {target}({', '.join(given)})"


def _target(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        namespace, _, name = node.target._schema.name.partition("::")
        return f"{namespace}.{name}"
    return "getitem" if node.target is operator.getitem else name_of(node)


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return f" ({', '.join(map(str, value.shape))}) {str(value.dtype).removeprefix('torch.')}"
    return ""


def _text(value: Any) -> str:
    return str(map_arg(value, _Name))  # type: ignore[arg-type]


class _Name:
    """A node within an argument; its ``repr`` is the name of a weight, or of the node."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def __repr__(self) -> str:
        return qualified_name(self._node) if self._node.op in ("placeholder", "get_attr") else self._node.name


def _merged(before: Sequence[str], after: Sequence[str]) -> Iterator[Line]:
    for kind, i0, i1, j0, j1 in difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "equal":
            yield from ((" ", text) for text in after[j0:j1])
        else:
            yield from (("-", text) for text in before[i0:i1])
            yield from (("+", text) for text in after[j0:j1])
