"""Standard operators in place of ours: the same numbers, and the saving where gathering pays."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from fxprune.lowering import decompose as module
from fxprune.lowering.decompose import decompose
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fxprune.ops import depthwise_taps, tile_conv, tile_gemm, tile_pack
from fxprune.ops.operator import Operator
from tests.oracle import assert_exact

OPERATORS = (depthwise_taps.OPERATOR, tile_gemm.OPERATOR, tile_conv.OPERATOR)


class Packed(nn.Module):
    """One operator with its packed tensors as buffers and the rest as arguments, as an export has it."""

    def __init__(self, op: Operator, args: tuple[Any, ...]) -> None:
        super().__init__()
        self.call, (leaves, self.spec) = getattr(torch.ops.fxprune, op.name).default, tree_flatten(args)
        fixed = 3 if op.name == "depthwise_taps" else 5
        self.leaves: list[Any] = []
        self.free: list[Tensor] = []
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                leaf = (leaf * 2).round().clamp(-3, 3)
            if isinstance(leaf, Tensor) and 0 < i < fixed:
                self.register_buffer(f"packed{i}", leaf)
                leaf = f"packed{i}"
            elif isinstance(leaf, Tensor):
                self.free.append(leaf)
                leaf = None
            self.leaves.append(leaf if not isinstance(leaf, str) or leaf.startswith("packed") else f"={leaf}")
        self.tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not 0 < i < fixed]

    def forward(self, *given: Tensor) -> Tensor:
        rest, leaves = iter(given), []
        for i, leaf in enumerate(self.leaves):
            if i in self.tensors:
                leaf = next(rest)
            elif isinstance(leaf, str):
                leaf = leaf[1:] if leaf.startswith("=") else getattr(self, leaf)
            leaves.append(leaf)
        return self.call(*tree_unflatten(leaves, self.spec))  # type: ignore[no-any-return]


def exported(op: Operator, args: tuple[Any, ...]) -> tuple[torch.fx.GraphModule, list[Tensor]]:
    call = Packed(op, args)
    with torch.no_grad():
        return torch.export.export(call, tuple(call.free)).module(check_guards=False), call.free


def operators(gm: nn.Module, given: list[Tensor]) -> Counter[str]:
    with torch.no_grad():
        program = torch.export.export(gm, tuple(given))
    return Counter(str(n.target).split(".")[1] for n in program.graph.nodes if n.op == "call_function")


@pytest.mark.parametrize("cheap", [True, False], ids=["gathered", "with zeros"])
@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.name)
def test_same_integers(op: Operator, cheap: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GATHER", 0 if cheap else 10**9)
    for args in op.samples():
        if isinstance(args[-1], str) and args[-1] not in ("none", "relu6", "hardswish"):
            args = (*args[:-1], "relu6")  # the others round
        gm, given = exported(op, args)
        with torch.no_grad():
            expected = gm(*given)
            assert decompose(gm) == 1
            assert not any(getattr(n.target, "namespace", "") == "fxprune" for n in gm.graph.nodes)
            assert_exact(gm(*given), expected, repro=op.name, trusted=False)
        assert not any(name.startswith("fxprune") for name in operators(gm, given))


def linear(n: int, k: int, g: int, kept: float, columns: int | None = None) -> tuple[Any, ...]:
    gen = torch.Generator().manual_seed(1)
    features = torch.arange(n if columns is None else columns)
    lists = [torch.nonzero(torch.rand(k, generator=gen) < kept).flatten() for _ in range(-(-len(features) // g))]
    ptr = torch.tensor([0, *map(len, lists)]).cumsum(0)
    values = torch.randn(int(ptr[-1]) * g, generator=gen)
    packed = (values, torch.cat(lists).int(), ptr.int(), features.int())
    return torch.randn(4, k, generator=gen), *packed, torch.randn(n, generator=gen), None, None, n, g, -1, "none"


def test_wide_tiles_are_gathered_and_narrow_ones_are_not() -> None:
    gm, given = exported(tile_gemm.OPERATOR, linear(256, 128, 64, 0.25))
    decompose(gm)
    found = operators(gm, given)
    assert found["index_select"] == 4 and found["matmul"] == 4 and found["linear"] == 0
    gm, given = exported(tile_gemm.OPERATOR, linear(256, 128, 8, 0.5))
    decompose(gm)
    found = operators(gm, given)
    assert found["index_select"] == 0 and found["linear"] == 1


def test_what_is_gone_is_not_multiplied() -> None:
    gm, given = exported(tile_gemm.OPERATOR, linear(256, 128, 64, 0.9, columns=128))
    decompose(gm)
    weights = [tuple(b.shape) for name, b in gm.named_buffers() if "weight" in name]
    assert weights == [(128, 128)] and operators(gm, given)["index_select"] == 1


def test_tiles_with_the_same_rows_are_one_product() -> None:
    index, ptr = torch.tensor([1, 5, 7, 1, 5, 7]).int(), torch.tensor([0, 3, 6]).int()
    packed = (torch.ones(2 * 3 * 64), index, ptr, torch.arange(128).int())
    args = (torch.ones(2, 16), *packed, None, None, None, 128, 64, -1, "none")
    gm, _ = exported(tile_gemm.OPERATOR, args)
    decompose(gm)
    assert [tuple(b.shape) for name, b in gm.named_buffers() if "weight" in name] == [(128, 3)]


def test_packed_tensors_that_are_inputs_stay() -> None:
    class Live(nn.Module):
        def forward(self, x: Tensor, *packed: Tensor) -> Tensor:
            return torch.ops.fxprune.tile_gemm(x, *packed, None, None, None, 8, 4, -1, "none")  # type: ignore[no-any-return]

    packed = tile_pack.random_structure(8, 6, 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        gm = torch.export.export(Live(), (torch.ones(2, 6), *packed)).module(check_guards=False)
    before = copy.deepcopy([str(n.target) for n in gm.graph.nodes])
    assert decompose(gm) == 0 and [str(n.target) for n in gm.graph.nodes] == before
