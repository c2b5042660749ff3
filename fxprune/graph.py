"""Reading and replacing nodes of a pre-autograd ATen graph."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from fxprune.errors import VerificationError

aten = torch.ops.aten

_IN_PLACE_OPERATORS = {
    "setitem",
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "imod",
    "ipow",
    "iand",
    "ior",
    "ixor",
    "imatmul",
}


TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default)


def example(node: Node) -> Any:
    """Return the fake value of a node (Dynamo keeps it as ``example_value``, export as ``val``)."""
    return node.meta.get("example_value", node.meta.get("val"))


def copied(gm: GraphModule) -> GraphModule:
    """Return a copy of a graph that AOTAutograd takes for the graph itself.

    By what Dynamo wrote beside it AOTAutograd knows which inputs are parameters, and saves those for the backward graph
    instead of views of them.
    """
    clone = GraphModule(gm, copy.deepcopy(gm.graph))
    clone.meta = dict(gm.meta)
    if hasattr(gm, "_param_name_to_source"):
        clone._param_name_to_source = gm._param_name_to_source
    for old, new in zip(gm.graph.nodes, clone.graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    return clone


def fake(node: Any) -> Tensor | None:
    """Return the fake tensor of a node; ``None`` when it is something else."""
    value = example(node) if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def shape(node: Any) -> tuple[Any, ...] | None:
    """Return the shape of a node's tensor, symbols included; ``None`` when it is not a tensor."""
    value = fake(node)
    return None if value is None else tuple(value.shape)


def same_shape(a: Any, b: Any) -> bool:
    """True when both shapes are known to agree without adding a guard."""
    return equal_sizes(shape(a), shape(b))


def equal_sizes(left: Sequence[Any] | None, right: Sequence[Any] | None) -> bool:
    """True when two lists of sizes are known to agree without adding a guard."""
    if left is None or right is None or len(left) != len(right):
        return False
    return all(statically_known_true(x == y) for x, y in zip(left, right, strict=True))


def same_dtype(*nodes: Any) -> bool:
    """True when all are tensors of one known dtype: a kernel takes one where eager would promote."""
    dtypes = {None if value is None else value.dtype for value in map(fake, nodes)}
    return len(dtypes) == 1 and None not in dtypes


def is_call(node: Any, *targets: Any) -> TypeGuard[Node]:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def name_of(node: Node) -> str:
    """Return the bare name of what a node calls: "conv2d" of ``aten.conv2d.default``, of ``F.conv2d`` and of a method."""
    if node.op == "call_method":
        return str(node.target)
    schema = getattr(node.target, "_schema", None)
    name = schema.name if schema is not None else getattr(node.target, "__name__", str(node.target))
    return str(name).rpartition("::")[2]


def argument(node: Node, name: str) -> Any:
    """Return an operand of an ATen call by its schema name, the default when it was not given."""
    if name in node.kwargs:
        return node.kwargs[name]
    for position, arg in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if arg.name == name:
            return node.args[position] if position < len(node.args) else arg.default_value
    raise KeyError(f"{node.target} has no argument {name!r}")


def pair(value: Any) -> tuple[int, int]:
    """Return a window argument as (height, width)."""
    items = [value] if isinstance(value, int) else list(value)
    return (items[0], items[0]) if len(items) == 1 else (items[0], items[1])


def sole_user(node: Node) -> Node | None:
    """Return the one user of a node; ``None`` when it has none or several (a graph output counts)."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def mutates(node: Node) -> bool:
    """True when a call may write to one of its operands."""
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    name = name_of(node)
    in_place = name.endswith("_") or name in _IN_PLACE_OPERATORS
    return in_place or bool(node.kwargs.get("inplace")) or node.kwargs.get("out") is not None


def mutation_between(first: Node, last: Node) -> bool:
    """True when something between two nodes may write memory, so reads must not move across it."""
    node = first.next
    while node is not last and node.op != "root":
        if mutates(node):
            return True
        node = node.next
    return False


def transformed(graph: Graph) -> set[Node]:
    """Return the calls inside functorch's transforms (vmap, grad, jvp): their values are wrapped, so none is rewritten."""
    depth, inside = 0, set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = name_of(node)
        depth += name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")
        if depth:
            inside.add(node)
    return inside


def call(anchor: Node, target: Any, *args: Any) -> Node:
    """Insert ``target(*args)`` before ``anchor`` with metadata computed on fakes."""
    graph = anchor.graph
    with graph.inserting_before(anchor):
        node = graph.call_function(target, args)
    node.meta = {k: v for k, v in anchor.meta.items() if k in ("stack_trace", "nn_module_stack", "source_fn_stack")}
    values = torch.fx.map_arg(args, example)
    mode = next((m for value in tree_leaves(values) if (m := getattr(value, "fake_mode", None))), None)
    if mode is not None:
        with mode, torch.no_grad():
            node.meta["example_value"] = target(*values)
    return node


def replace(old: Node, new: Node) -> None:
    """Let every user of ``old`` read ``new`` and erase ``old``.

    Raises :class:`~fxprune.errors.VerificationError` when shape or dtype would change.
    """
    before, after = fake(old), fake(new)
    if before is not None and after is not None and not (same_shape(old, new) and before.dtype == after.dtype):
        given, expected = (f"{t.dtype} {tuple(t.shape)}" for t in (after, before))
        raise VerificationError(stage="rewrite", what=f"{old} -> {new}", given=given, expected=expected)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)
