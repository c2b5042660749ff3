"""Every operator gets a provider, in the order of the tables, or a NotLowered that lists every reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fxprune.lowering.kernels import KernelTables
from fxprune.lowering.kernels.impl import Impl
from fxprune.lowering.lower import lower
from torch.fx import Graph, GraphModule

from fxprune.errors import NotLowered
from fxprune.ops import OPS


def graph_of_every_operator() -> GraphModule:
    graph = Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = torch.zeros(1, 2, 3, 3)
    for op in OPS:
        graph.call_function(getattr(torch.ops.fxprune, op.name).default, (x,))
    graph.call_function(torch.ops.aten.relu.default, (x,))
    graph.output(x)
    return GraphModule(torch.nn.Module(), graph)


def impl(op: str, provider: str, reason: str | None) -> Impl:
    def supports(*operands: Any) -> str | None:
        assert operands[0].shape == (1, 2, 3, 3)
        return reason

    return Impl(op, provider, lambda *args: None, supports)


def test_the_first_that_supports_is_taken_and_recorded() -> None:
    rows = [impl(op.name, p, r) for op in OPS for p, r in (("fast", "needs more"), ("second", None), ("third", None))]
    gm = graph_of_every_operator()
    assert lower(gm, KernelTables((tuple(rows),))) == {f"{op.name}=second": 1 for op in OPS}
    recorded = [n.meta.get("fxprune_impl") for n in gm.graph.nodes if n.op == "call_function"]
    assert recorded == ["second"] * len(OPS) + [None]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), r"fxprune::depthwise_taps.*none is registered"),
        ((impl("depthwise_taps", "a", "too old"), impl("depthwise_taps", "b", "too new")), "a: too old; b: too new"),
    ],
)
def test_nothing_is_left_without_a_kernel(rows: tuple[Impl, ...], message: str) -> None:
    with pytest.raises(NotLowered, match=message):
        lower(graph_of_every_operator(), KernelTables((rows,)))


def test_the_tables_hold_every_operator() -> None:
    assert sum(lower(graph_of_every_operator(), KernelTables()).values()) == len(OPS)
