"""Give every semantic operator of a graph its implementation, and say which."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from ..errors import NotLowered
from ..graph import fake, name_of
from .kernels import KernelTables


def lower(gm: GraphModule, tables: KernelTables) -> dict[str, int]:
    """Record the provider on every ``fxprune::`` node; returns counts by "operator=provider".

    Raises :class:`~fxprune.errors.NotLowered` when nothing supports a node: a semantic operator without a
    kernel is a bug, never a silent fallback.
    """
    counts: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and getattr(node.target, "namespace", "") == "fxprune":
            name = name_of(node)
            provider = _choose(name, node, tables)
            node.meta["fxprune_impl"] = provider
            key = f"{name}={provider}"
            counts[key] = counts.get(key, 0) + 1
    return counts


def _choose(name: str, node: Node, tables: KernelTables) -> str:
    reasons = []
    for impl in tables.candidates(name):
        reason = impl.supports(*[fake(a) for a in node.args[:2]])
        if reason is None:
            return impl.provider
        reasons.append(f"{impl.provider}: {reason}")
    raise NotLowered(op=f"fxprune::{name}", reasons="; ".join(reasons) or "none is registered")
