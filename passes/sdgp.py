"""Structured data gradient pruning: in the backward graph, prune the dL/dO that the data gradient reads.

    dX, dW, db = convolution_backward(g, x, w)  =>  dX = convolution_backward(nm_prune(g), x, w), or
                                                    skip_zeros_conv(nm_prune(g), w), dW, db as before
    dX = mm(g, w)                               =>  dX = mm(nm_prune(g), w), or skip_zeros_mm(nm_prune(g), w), or on
                                                    a GPU nm_mm(g, w), which prunes by itself

Runs on the joint graph of AOTAutograd. ``passes/mark_gradients.py`` left a mark on each dL/dO; from there views are
followed to the products that read it. One that adds up over the output features is the data gradient, one that adds up
over everything else the weight gradient. Nothing else changes: weight and bias gradients read what they read before.
Source: arXiv 2202.00774, Algorithm 1. ``target="dW"`` prunes the copy that the weight gradient reads, along the rows or
pixels it adds up (Chmiel et al., ICLR 2023).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ..gradients import Ratio
from ..graph import argument, aten
from ..ops import nm_mm

_MARK = torch.ops.fxprune_mark.gradient.default
_OUTPUT = torch.ops.fxprune_mark.output.default
_PRUNE = torch.ops.fxprune.nm_prune.default
_SKIP = torch.ops.fxprune.skip_zeros_mm.default
_HALVES = torch.ops.fxprune.nm_mm.default
_LIBRARY = torch.ops.fxprune_library.nm_mm.default
_SKIP_CONV = torch.ops.fxprune.skip_zeros_conv.default
_BACKWARD = aten.convolution_backward.default
_PRODUCTS = (aten.mm.default, aten.bmm.default)
# the gradients of our own layers over kept weights: what reads dL/dO first, and whether it is the data gradient
_TILES = {
    torch.ops.fxprune.tile_grad_input.default: True,
    torch.ops.fxprune.tile_conv_grad_input.default: True,
    torch.ops.fxprune.tile_grad_weight.default: False,
    torch.ops.fxprune.tile_conv_grad_weight.default: False,
}
_SHAPED = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.expand.default,
)
_SAME = (
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten._to_copy.default,
    torch.ops.prims.convert_element_type.default,
)


@dataclass(frozen=True)
class Sdgp:
    """The pass and its settings; ``identity`` belongs into every cache key.

    skips: the numbers of the layers whose data gradient multiplies by skipping zeros, where it is a product of matrices.
    library: those among them that multiply by a library's product, on a GPU.
    """

    ratio: Ratio
    function: str
    target: str
    skips: frozenset[int] = frozenset()
    library: frozenset[int] = frozenset()

    @property
    def identity(self) -> str:
        source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
        return f"sdgp-{self.ratio}-{self.function}-{self.target}-{sorted(self.skips)}-{sorted(self.library)}-{source}"

    def __call__(self, graph: Graph) -> int:
        """Rewrite a joint graph; returns the number of gradients pruned."""
        marks = [n for n in graph.nodes if n.target is _MARK]
        pruned = sum(_Layer(mark, self).rewrite() for mark in marks)
        for node in [n for n in graph.nodes if n.target in (_MARK, _OUTPUT)]:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        return pruned


@dataclass(frozen=True)
class Use:
    """A call that reads a gradient at operand ``position``, after ``path``, the views in between."""

    node: Node
    position: int
    path: tuple[Node, ...]
    data: bool


class _Layer:
    """One marked gradient."""

    def __init__(self, mark: Node, settings: Sdgp) -> None:
        self.mark, self.settings = mark, settings
        _, self.key, self.number, dim, self.groups = mark.args
        self.dim: Any = dim
        self.axis = self.dim % _value(mark).dim()
        self.wants = {"dX": (True,), "dW": (False,), "both": (True, False)}[settings.target]

    def rewrite(self) -> int:
        """Prune what the settings ask for; returns 1 when anything was."""
        changed = 0
        for use in list(_uses(self.mark, self.axis, ())):
            if use.node.target is _BACKWARD:
                changed += self._split(use)
            elif use.data in self.wants and use.data and self._halves(use.node, use.position):
                prunes = nm_mm.prunes(self.settings.function, *self._ratio)
                given = self._replay(use, self.mark if prunes else None)
                target = _LIBRARY if self.number in self.settings.library else _HALVES
                product = _insert(use.node, target, (given, use.node.args[1]))
                use.node.replace_all_uses_with(product)
                use.node.graph.erase_node(use.node)
                changed += 1
            elif use.data in self.wants:
                pruned = self._replay(use)
                if use.data and self._skips(use.node, use.position):
                    product = self._skipping(use.node, _SKIP, (pruned, use.node.args[1], -1))
                    use.node.replace_all_uses_with(product)
                    use.node.graph.erase_node(use.node)
                else:
                    use.node.update_arg(use.position, pruned)
                changed += 1
        return min(changed, 1)

    @property
    def _ratio(self) -> tuple[int, int]:
        return self.settings.ratio.n, self.settings.ratio.m

    def _halves(self, node: Node, position: int) -> bool:
        """True for a product of 16-bit matrices that is to run on the sparse tensor cores of a GPU."""
        if self.number not in self.settings.skips or position != 0 or node.target is not aten.mm.default:
            return False
        left, right = (_value(a) for a in (argument(node, "self"), argument(node, "mat2")))
        return nm_mm.runs(left, right, *self._ratio)

    def _skips(self, node: Node, position: int) -> bool:
        """True where a layer is to skip zeros and a product in float32 can."""
        if self.number not in self.settings.skips or position != 0 or node.target not in (aten.mm.default, _BACKWARD):
            return False
        operands = [_value(a) for a in node.all_input_nodes]
        if any(v.dtype != torch.float32 for v in operands):
            return False
        if node.target is not _BACKWARD:
            return True
        names = ("weight", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
        weight, stride, padding, dilation, transposed, extra, groups = (argument(node, name) for name in names)
        window = _value(weight).shape[2:]
        if transposed or any(extra) or not all(statically_known_true(v == 1) for v in (*stride, groups)):
            return False
        if all(statically_known_true(v == 1) for v in window):
            return not any(padding)
        inside = all(pad < size for pad, size in zip(padding, window, strict=True))
        return len(window) == 2 and inside and all(v == 1 for v in dilation)

    def _skipping(self, node: Node, target: Any, args: tuple[Any, ...]) -> Node:
        """Insert a product in front of ``node``, whose first result it replaces, with the strides of that."""
        product = _insert(node, target, args)
        old = _value(node) if isinstance(_value(node), Tensor) else _value(node)[0]
        if product.meta["val"].stride() != old.stride():
            last = not old.is_contiguous() and old.dim() in (4, 5)
            layout = (torch.channels_last, torch.channels_last_3d)[old.dim() - 4] if last else torch.contiguous_format
            product = _insert(node, aten.clone.default, (product,), None, {"memory_format": layout})
        return product

    def _split(self, use: Use) -> int:
        """Give each gradient of a convolution the copy it reads; returns 0 when none is pruned."""
        node = use.node
        mask = argument(node, "output_mask")
        kinds = [
            kind if wanted and kind in self.wants else None for kind, wanted in zip((True, False, None), mask, strict=True)
        ]
        if kinds == [None] * 3:
            return 0
        parts: dict[bool | None, Node] = {}
        product = None
        if kinds[0] and self._skips(node, 0):
            product = self._convolved(node, self._replay(replace(use, data=True)))
        asked_for = zip(kinds, mask, strict=True)
        for kind in dict.fromkeys(kind for kind, wanted in asked_for if wanted and not (kind and product)):
            wanted = [asked and other is kind for asked, other in zip(mask, kinds, strict=True)]
            grad = node.args[0] if kind is None else self._replay(replace(use, data=kind))
            values = [v if w else None for v, w in zip(node.meta["val"], wanted, strict=True)]
            parts[kind] = _insert(node, _BACKWARD, (grad, *node.args[1:-1], wanted), tuple(values))
        for item in list(node.users):
            index: Any = item.args[1]
            if index == 0 and product is not None:
                item.replace_all_uses_with(product)
                node.graph.erase_node(item)
            else:
                item.update_arg(0, parts[kinds[index]])
        node.graph.erase_node(node)
        return 1

    def _convolved(self, node: Node, grad: Node) -> Node:
        """Insert the data gradient of a convolution that skips zeros."""
        weight: Any = node.args[2]
        shape = list(_value(weight).shape)
        if any(size != 1 for size in shape[2:]):
            return self._skipping(node, _SKIP_CONV, (grad, weight, argument(node, "padding")))
        matrix = _insert(node, aten.reshape.default, (weight, shape[:2]))
        return self._skipping(node, _SKIP, (grad, matrix, 1))

    def _replay(self, use: Use, current: Node | None = None) -> Node:
        """Apply the views in front of a use to the pruned gradient, or to ``current``."""
        current = current or self._pruned(use.data, use.node)
        for view in use.path:
            current = _insert(use.node, view.target, (current, *view.args[1:]), None, view.kwargs)
        return current

    def _pruned(self, data: bool, before: Node) -> Node:
        """Insert the pruning of the gradient ahead of ``before``."""
        rest = (self.settings.function, self.number)
        ratio = self._ratio
        if data:
            return _insert(before, _PRUNE, (self.mark, self.key, *ratio, self.dim, self.groups, *rest))
        shape = list(_value(self.mark).shape)
        rows = self.dim == -1 or all(statically_known_true(size == 1) for size in shape[2:])
        # groups lie along what a weight gradient adds up: the rows of a matrix, the pixels of a map
        flat = [1, -1, shape[self.axis]] if rows else [*shape[:2], -1]
        view = _insert(before, aten.reshape.default, (self.mark, flat))
        pruned = _insert(before, _PRUNE, (view, self.key, *ratio, 1 if rows else -1, 1, *rest))
        return _insert(before, aten.reshape.default, (pruned, shape))


def _uses(node: Node, axis: int, path: tuple[Node, ...]) -> Iterator[Use]:
    """Yield the convolutions and products that read a gradient; ``axis`` is that of the output features."""
    for user in node.users:
        if user.target is _BACKWARD and user.args[0] is node:
            yield Use(user, 0, path, True)
        elif user.target in _TILES and user.args[0] is node:
            yield Use(user, 0, path, _TILES[user.target])
        elif user.target in _PRODUCTS:
            for position in (0, 1):
                if user.args[position] is node:
                    summed = _value(node).dim() - 1 - position
                    yield Use(user, position, path, axis == summed)
        else:
            moved = _moved(user, node, axis)
            if moved is not None:
                yield from _uses(user, moved, (*path, user))


def _moved(view: Node, node: Node, axis: int) -> int | None:
    """Return the axis of the features after a view, ``None`` when it is no view or mixes them with others."""
    if not view.args or view.args[0] is not node:
        return None
    rank = _value(node).dim()
    if view.target in _SAME:
        return axis
    if view.target is aten.t.default:
        return rank - 1 - axis
    if view.target is aten.permute.default:
        return [d % rank for d in argument(view, "dims")].index(axis)
    if view.target is aten.transpose.int:
        swap = [argument(view, name) % rank for name in ("dim0", "dim1")]
        return swap[1 - swap.index(axis)] if axis in swap else axis
    if view.target not in _SHAPED:
        return None
    before, after = _value(node).shape, _value(view).shape
    if view.target is aten.expand.default:
        return axis + len(after) - len(before)
    return next((i for i in range(len(after)) if _same_place(before, axis, after, i)), None)


def _same_place(before: Any, axis: int, after: Any, i: int) -> bool:
    """True when axis ``i`` has the size of ``axis`` and as much memory behind it."""
    inner = [1, 1]
    for size in before[axis + 1 :]:
        inner[0] = inner[0] * size
    for size in after[i + 1 :]:
        inner[1] = inner[1] * size
    return statically_known_true(before[axis] == after[i]) and statically_known_true(inner[0] == inner[1])


def _value(node: Node) -> Any:
    return node.meta["val"]


def _insert(before: Node, target: Any, args: Any, value: Any = None, kwargs: Any = None) -> Node:
    """Insert a call of the backward graph; its fake value is computed unless given."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args, dict(kwargs or {}))
    kept = ("stack_trace", "nn_module_stack", "fwd_nn_module_stack", "seq_nr", "original_aten")
    node.meta = {name: before.meta[name] for name in kept if name in before.meta}
    node.meta["partitioner_tag"] = "is_backward"
    if value is None:
        values = torch.fx.map_arg((args, dict(kwargs or {})), _value)
        mode = next(v.fake_mode for v in torch.utils._pytree.tree_leaves(values) if hasattr(v, "fake_mode"))
        with mode, torch.no_grad():
            value = target(*values[0], **values[1])
    node.meta["val"] = value
    return node
