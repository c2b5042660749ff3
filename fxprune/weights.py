"""The real tensors behind a captured graph, and the tensors derived from them (folded, packed).

Dynamo hands a backend its graph with the weights as placeholders and the real Parameters beside it; an exported
program holds them as attributes. A derived tensor becomes one more graph input. Each remembers what it was built
from, so a weight that changes after compile is repacked into the same buffers. Once a graph is compiled only what it
reads is held: the user's weights live as long as the user wants, and what was derived on the way is built anew.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node

from fxprune.graph import example
from fxprune.ops.bundle import bundle, unbundle

STATE_NAME = "fxprune_state_name"  # node.meta: the qualified name of a captured parameter or buffer
Build = Callable[..., tuple[Tensor, ...]]
Fits = Callable[..., bool]


class StructureChanged(Exception):
    """The new weight does not fit the packed structure: the graph must be rebuilt."""


@dataclass(frozen=True, eq=False)
class Derived:
    """Tensors built from other tensors of the graph: those of ``nodes`` are ``build(*those of inputs)``.

    fits: asked of changed inputs, whether what was decided by the first ones still holds.
    """

    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    build: Build
    fits: Fits | None = None


class Weights:
    """Map graph nodes to the tensors behind them, and derive new ones."""

    def __init__(self, gm: GraphModule, example_inputs: Sequence[object] = ()) -> None:
        self._gm = gm
        self._real: dict[Node, Tensor] = {}
        self._released: dict[Node, weakref.ref[Tensor]] = {}  # the user's, which they alone keep
        self._origin: dict[Node, Node] = {}
        self.derived: list[Derived] = []
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        for node, value in zip(placeholders, example_inputs, strict=False):
            if isinstance(value, Tensor) and (isinstance(value, torch.nn.Parameter) or is_state(node)):
                self._real[node] = value
        for node in gm.graph.nodes:
            if node.op == "get_attr":
                value = _attribute(gm, node.target)
                if isinstance(value, Tensor):
                    self._real[node] = value

    def value(self, node: object) -> Tensor | None:
        """Return the tensor behind a weight, buffer or derived node; ``None`` for anything computed."""
        if not isinstance(node, Node):
            return None
        released = self._released.get(node)
        return self._real.get(node) if released is None else released()

    def given(self) -> list[tuple[Node, Tensor]]:
        """Return the user's parameters, buffers and constants with their nodes."""
        derived = {node for entry in self.derived for node in entry.nodes}
        return [(node, value) for node, value in self._real.items() if node not in derived]

    def origin(self, node: Node) -> Node:
        """Return the parameter node that a derived node stands for."""
        return self._origin.get(node, node)

    def is_derived(self, node: Node) -> bool:
        return any(node in entry.nodes for entry in self.derived)

    def derive(
        self, names: Sequence[str], inputs: Sequence[Node], build: Build, fits: Fits | None = None, own: bool = False
    ) -> tuple[Node, ...]:
        """Add one graph input per tensor of ``build(*tensors of inputs)``; returns their nodes.

        The first input is the parameter that the results stand for; without inputs they are constants. fits: as
        :class:`Derived` has it. own: the results stand for no parameter of the model.
        """
        tensors = tuple(self._real[n] for n in inputs)
        with torch.inference_mode(False), torch.no_grad():
            given = {_memory(t) for t in tensors}
            buffers = tuple(_alone(t.detach(), given if inputs else None) for t in self._built(build, tensors))
        nodes = []
        for name, buffer in zip(names, buffers, strict=True):
            nodes.append(self._input(name, buffer))
            if inputs and not own:
                self._origin[nodes[-1]] = self.origin(inputs[0])
        self.derived.append(Derived(tuple(nodes), tuple(inputs), build, fits))
        return tuple(nodes)

    def _input(self, name: str, value: Tensor) -> Node:
        """Add a graph input behind the others."""
        last = [n for n in self._gm.graph.nodes if n.op == "placeholder"][-1]
        with self._gm.graph.inserting_after(last):
            node = self._gm.graph.placeholder(name)
        node._dynamo_source = None  # type: ignore[attr-defined]  # AOTAutograd asks it of every input
        node.meta["example_value"] = _fake_like(self._gm, value)
        self._real[node] = value
        return node

    def bundle(self, nodes: Sequence[Node]) -> tuple[list[Node], list[int]]:
        """Move the tensors behind ``nodes`` into one graph input per type; returns those and the layout.

        Derived tensors become views of those (``fxprune/ops/bundle.py``), refreshed there; the user's own are copied first.
        """
        own = [n if self.is_derived(n) else self._copied(n) for n in nodes]
        with torch.inference_mode(False), torch.no_grad():
            whole, layout = bundle([self._real[n] for n in own])
            moved = {id(self._real[n]): p.view_as(self._real[n]) for n, p in zip(own, unbundle(whole, layout), strict=True)}
        self._real = {node: moved.get(id(value), value) for node, value in self._real.items()}
        holders = [self._input(f"weights_{str(t.dtype).removeprefix('torch.')}", t) for t in whole]
        self.derived.append(Derived(tuple(holders), (), lambda: tuple(whole)))  # their parts are refreshed
        return holders, layout

    def _copied(self, node: Node) -> Node:
        return self.derive((f"{node.name}_copy",), (node,), lambda t: (t,), own=True)[0]

    def _built(self, build: Build, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run ``build`` on the CPU, where masks and index lists live, and put the results on the weights' device."""
        device = next((t.device for t in (*tensors, *self._real.values()) if not t.is_meta), torch.device("cpu"))
        return tuple(t.to(device) for t in build(*(t.cpu() for t in tensors)))

    def appended(self) -> list[Tensor]:
        """Drop derived inputs nobody uses and return the tensors of the rest, in placeholder order."""
        mine = {node for entry in self.derived for node in entry.nodes}
        kept = []
        for node in [n for n in self._gm.graph.nodes if n.op == "placeholder" and n in mine]:
            if node.users:
                kept.append(self._real[node])
            else:
                self._gm.graph.erase_node(node)
        return kept

    def watched(self) -> list[Tensor]:
        """Return the user's tensors that anything derived depends on."""
        own = {node for entry in self.derived for node in entry.nodes}
        sources = [self.value(node) for entry in self.derived for node in entry.inputs if node not in own]
        return list({id(tensor): tensor for tensor in sources if tensor is not None}.values())

    def release(self) -> None:
        """Hold no longer what the graph does not read: the user's tensors, and derived ones that others are built from.

        Of those the shape and type stay; integers stay whole, because a structure must not change. Call it behind
        :meth:`appended`.
        """
        own = {node for entry in self.derived for node in entry.nodes}
        inputs = {node for node in self._gm.graph.nodes if node.op == "placeholder"}
        read = {_memory(self._real[node]) for node in own & inputs}
        for node, value in list(self._real.items()):
            if node in own:
                if value.is_floating_point() and _memory(value) not in read:
                    self._real[node] = value.to("meta")
            elif node.op == "placeholder":
                self._released[node] = weakref.ref(self._real.pop(node))

    def clear(self) -> None:
        """Hold nothing more: a weight is gone, and what was derived with it is never read again."""
        self.derived.clear()
        self._real.clear()

    def refresh(self) -> None:
        """Rebuild every derived tensor into its buffer.

        Raises :class:`StructureChanged` when a result no longer has the shape or the integers it had.
        """
        passing: dict[Node, Tensor] = {}  # those that nobody holds
        with torch.inference_mode(False), torch.no_grad():
            for entry in self.derived:
                tensors = [passing[n] if n in passing else self.value(n) for n in entry.inputs]
                if any(t is None for t in tensors) or not (entry.fits is None or entry.fits(*tensors)):
                    raise StructureChanged
                for node, new in zip(entry.nodes, self._built(entry.build, tensors), strict=True):  # type: ignore[arg-type]
                    buffer = self._real[node]
                    if new.shape != buffer.shape or new.dtype != buffer.dtype:
                        raise StructureChanged
                    if buffer.is_meta:
                        passing[node] = new
                    elif new is buffer:
                        continue
                    elif buffer.is_floating_point() or buffer.dtype in (torch.uint8, torch.int8):  # values, or an image
                        buffer.copy_(new)
                    elif not torch.equal(buffer, new):
                        raise StructureChanged


def _alone(tensor: Tensor, given: set[int] | None) -> Tensor:
    """Return a contiguous tensor with memory of its own. given: that of the inputs, ``None`` when it may be anybody's."""
    whole = tensor.contiguous()
    theirs = whole.data_ptr() == tensor.data_ptr() and (given is None or _memory(tensor) in given)
    return whole.clone() if theirs or whole.untyped_storage().nbytes() > whole.nbytes else whole


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def qualified_name(node: Node) -> str:
    """Return the name of a weight in the user's model, e.g. ``blocks.1.conv_dw.weight``."""
    if node.op == "get_attr":
        return str(node.target)
    if STATE_NAME in node.meta:
        return str(node.meta[STATE_NAME])
    source = _source_name(node)
    if not source:
        return node.name
    parts = [a or b or c for a, b, c in re.findall(r"\['([^']+)'\]|\[(\d+)\]|\.([A-Za-z_]\w*)", source)]
    keep = [p for p in parts if p not in ("_modules", "_parameters", "_buffers")]
    return ".".join(keep[1:]) or node.name


def _source_name(node: Node) -> str:
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    return name() if callable(name) else name


def remember_names(gm: GraphModule) -> None:
    """Write the names of parameters and buffers on their placeholders: Dynamo forgets them when its compile ends."""
    for node in gm.graph.nodes:
        if node.op == "placeholder" and is_state(node):
            node.meta[STATE_NAME] = qualified_name(node)


def is_state(node: Node) -> bool:
    """True for the placeholder of a module's parameter or buffer."""
    source = _source_name(node)
    return STATE_NAME in node.meta or "_buffers" in source or "_parameters" in source


def states(gm: GraphModule, inputs: Sequence[Any]) -> list[bool]:
    """Return for each input of a graph whether it is a module's parameter or buffer."""
    nodes = [n for n in gm.graph.nodes if n.op == "placeholder"]
    return [is_state(n) or isinstance(value, torch.nn.Parameter) for n, value in zip(nodes, inputs, strict=True)]


def are_hidden(inputs: Sequence[Any]) -> bool:
    """True when parameters are fake: ``DDPOptimizer`` compiles the parts of a model before they meet their weights."""
    return any(isinstance(value, FakeTensor) and isinstance(value, torch.nn.Parameter) for value in inputs)


def _attribute(gm: GraphModule, target: object) -> object:
    value: object = gm
    for part in str(target).split("."):
        value = getattr(value, part, None)
    return value


def _fake_like(gm: GraphModule, tensor: Tensor) -> Tensor:
    for node in gm.graph.nodes:
        mode = getattr(example(node), "fake_mode", None)
        if mode is not None:
            return FakeTensor(mode, tensor.to("meta"), tensor.device)
    return tensor
