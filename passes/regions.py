"""Which layers share a layout, and so are decided together.

    conv -> norm -> gelu -> conv                                       convolutions that exchange activations directly
    permute(NHWC) -> layer_norm -> linear -> gelu -> linear -> permute(NCHW)     a chain that can run feature-major

A chain starts at a permute to channels-last and may hold LayerNorm over the channels, products over the last dimension
and pointwise calls of one operand. It can run feature-major when every exit is the inverse permute; its products are then
1x1 convolutions of the region around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch.fx import Node

from ..context import Measure, Timing
from ..cost import hint
from ..graph import argument, aten, is_call
from ..match import Geometry, Match
from ..sparsity.pattern import LayerMask
from .fuse_epilogue import activation_name

_TO_LAST, _TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]


def regions(convs: list[Match]) -> Iterable[list[Match]]:
    """Group convolutions that exchange activations directly (through anything but another GEMM)."""
    nodes = {m.node: i for i, m in enumerate(convs)}
    parent = list(range(len(convs)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    for i, match in enumerate(convs):
        for source in _sources(match.node, nodes):
            parent[root(nodes[source])] = root(i)
    groups: dict[int, list[Match]] = {}
    for i, match in enumerate(convs):
        groups.setdefault(root(i), []).append(match)
    return groups.values()


def _sources(node: Node, nodes: dict[Node, int]) -> list[Node]:
    """Return the matched convolutions whose results reach ``node`` without passing another one."""
    found, stack, seen = [], list(node.all_input_nodes), set()
    while stack:
        current = stack.pop()
        if current in seen or current.op == "placeholder":
            continue
        seen.add(current)
        if current in nodes:
            found.append(current)
        else:
            stack.extend(current.all_input_nodes)
    return found


def chain(start: Node, is_product: Callable[[Node], bool]) -> tuple[list[Node], list[Node]] | None:
    """Return (inner nodes in graph order, exit permutes) of the chain that starts at a permute; ``None`` if it is none."""
    if start.op != "call_function" or not _is_permute(start, _TO_LAST):
        return None
    inner: list[Node] = []
    exits: list[Node] = []
    stack = list(start.users)
    while stack:
        node = stack.pop()
        if node in inner or node in exits:
            continue
        if _is_permute(node, _TO_FIRST):
            exits.append(node)
        elif _is_norm(node) or is_product(node) or activation_name(node) is not None:
            inner.append(node)
            stack.extend(node.users)
        else:
            return None
    order = {n: i for i, n in enumerate(start.graph.nodes)}
    return (sorted(inner, key=order.__getitem__), exits) if exits else None


def _is_permute(node: Node, order: list[int]) -> bool:
    return is_call(node, aten.permute.default) and [d % 4 for d in argument(node, "dims")] == order


def _is_norm(node: Node) -> bool:
    return is_call(node, aten.layer_norm.default) and len(argument(node, "normalized_shape")) == 1


def chained(matches: Iterable[Match]) -> list[list[Match]]:
    """Return the linear layers of each chain on the CPU."""
    linears = {m.node: m for m in matches if m.kind == "linear" and not m.on_gpu}
    if not linears:
        return []
    graph = next(iter(linears)).graph
    chains = (chain(node, linears.__contains__) for node in graph.nodes)
    found = ([linears[n] for n in inner if n in linears] for inner, _ in filter(None, chains))
    return [members for members in found if members]


def as_convolutions(chains: Iterable[Iterable[Match]]) -> Mapping[Match, Match]:
    """Return the 1x1 convolution that each linear layer of the chains becomes."""
    return {match: _as_convolution(match) for members in chains for match in members}


def _as_convolution(match: Match) -> Match:
    (b, h, w, k), n = match.geometry.x, match.geometry.y[-1]
    geometry = Geometry((b, k, h, w), (b, n, h, w))
    return replace(match, kind="pointwise", geometry=geometry, value=match.matrix(match.value), transposed=False)


def by_image(measure: Measure, match: Match, mask: LayerMask | None) -> Timing:
    """Time a layer as a region runs it: one image per thread, whose activations stay in the caches of its core.

    All images at once go through memory, which is what dense convolutions do and are timed at.
    """
    timing = measure(match, mask)
    batch, threads = hint(match.geometry.x[0]), torch.get_num_threads()
    if match.on_gpu or batch <= threads:
        return timing
    x, y = ((threads, *sizes[1:]) for sizes in (match.geometry.x, match.geometry.y))
    few = measure(replace(match, geometry=replace(match.geometry, x=x, y=y)), mask)
    return replace(timing, sparse=min(timing.sparse, few.sparse * batch / threads))
