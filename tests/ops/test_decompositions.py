"""Every operator says itself in core ATen, and the program that comes out computes what the operator computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

import fxprune
from fxprune.decompositions import BACKWARD
from fxprune.ops import OPS
from fxprune.ops.operator import Operator
from tests.oracle import nearness, tensors

# torch's own copy of a program warns about torch's own tree specifications
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")


class Call(nn.Module):
    """One operator; its tensors are inputs, as weights that another tool computes would be."""

    def __init__(self, op: Operator, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.call = getattr(torch.ops.fxprune, op.name)
        self.leaves, self.spec = tree_flatten(args)

    def forward(self, *given: Tensor) -> Any:
        rest = iter(given)
        leaves = [next(rest) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return self.call(*tree_unflatten(leaves, self.spec))


def programs(op: Operator) -> list[tuple[torch.export.ExportedProgram, list[Tensor], Any]]:
    found = []
    for args in op.samples():
        given = [leaf for leaf in tree_flatten(args)[0] if isinstance(leaf, Tensor)]
        with torch.no_grad():
            program = torch.export.export(Call(op, args), tuple(given))
            found.append((program, given, getattr(torch.ops.fxprune, op.name)(*args)))
    return found


EXPORTED = [op for op in OPS if op.name not in BACKWARD]


def test_the_table_names_what_an_export_may_hold() -> None:
    assert {target.name() for target in fxprune.decompositions()} == {f"fxprune::{op.name}" for op in EXPORTED}


@pytest.mark.parametrize("op", EXPORTED, ids=lambda op: op.name)
def test_runs_as_core_aten(op: Operator) -> None:
    for program, given, expected in programs(op):
        assert any(getattr(n.target, "namespace", "") == "fxprune" for n in program.graph.nodes)
        table = {**torch.export.default_decompositions(), **fxprune.decompositions()}
        plain = program.run_decompositions(table)
        calls = [n.target for n in plain.graph.nodes if n.op == "call_function"]
        for target in calls:
            if getattr(target, "namespace", "builtin") != "builtin" and "getitem" not in str(target):
                assert target.namespace == "aten", target
                core = torch.Tag.core in target.tags
                assert core, f"{op.name}: {target} is not core ATen"
        with torch.no_grad():
            got = tensors(plain.module()(*given))
        near = nearness(op.name)
        for a, b in zip(got, tensors(expected), strict=True):
            torch.testing.assert_close(a, b, rtol=near, atol=near)


def test_without_the_table_the_operators_stay() -> None:
    ((program, _, _), *_) = programs(OPS[0])
    plain = program.run_decompositions()
    assert any(getattr(n.target, "namespace", "") == "fxprune" for n in plain.graph.nodes)
