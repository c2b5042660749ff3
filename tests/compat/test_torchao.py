"""``sparsify_``: what torchao's did to the zeros, on ordinary parameters, and running on our kernels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxprune.compat.torchao import BlockSparseWeightConfig, SemiSparseWeightConfig, sparsify_
from fxprune.errors import ConfigError, NothingToPrune
from fxprune.plan import lookup
from tests.oracle import assert_exact, compiled
from tests.toys import mlp, rows, run


def test_two_of_four_stay() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8))
    before = [layer.weight.detach().clone() for layer in model]
    assert sparsify_(model, SemiSparseWeightConfig()) is model
    for layer, old in zip(model, before, strict=True):
        assert type(layer.weight) is nn.Parameter and layer.weight.requires_grad
        groups, dense = layer.weight.detach().view(-1, 4), old.view(-1, 4)
        assert ((groups != 0).sum(1) == 2).all()
        assert torch.equal(groups.abs().sum(1), dense.abs().topk(2, dim=1).values.sum(1))
    expected = [layer.weight.detach().clone() for layer in model]
    sparsify_(model, SemiSparseWeightConfig())
    assert all(torch.equal(layer.weight, old) for layer, old in zip(model, expected, strict=True))


def test_it_runs_on_our_kernels() -> None:
    torch._dynamo.reset()
    model = sparsify_(mlp(), SemiSparseWeightConfig())
    fast = compiled(model)
    assert_exact(run(fast.call, rows()), run(model, rows()))
    assert [d.kernel for ctx in fast.contexts for d in ctx.decisions] == ["tile_gemm", "tile_gemm"]
    assert {lookup(p).pattern for n, p in model.named_parameters() if "weight" in n} == {"2:4"}  # type: ignore[union-attr]


def test_only_what_the_filter_accepts() -> None:
    model = mlp()
    before = model[2].weight.detach().clone()
    sparsify_(model, SemiSparseWeightConfig(), filter_fn=lambda module, name: name == "0")
    assert torch.equal(model[2].weight, before) and lookup(model[2].weight) is None and lookup(model[0].weight) is not None


def test_blocks_that_are_zero_are_recorded_and_nothing_is_pruned() -> None:
    model = nn.Sequential(nn.Linear(10, 12))
    with torch.no_grad():
        model[0].weight[:4, 4:8] = 0
    before = model[0].weight.detach().clone()
    sparsify_(model, BlockSparseWeightConfig(4))
    pruned = lookup(model[0].weight)
    assert pruned is not None and pruned.pattern == "block:4x4" and torch.equal(model[0].weight, before)
    wanted = torch.ones(12, 10, dtype=torch.bool)
    wanted[:4, 4:8] = False
    assert torch.equal(pruned.mask, wanted)


def test_bad_requests_change_nothing() -> None:
    model = mlp()
    before = model[0].weight.detach().clone()
    with pytest.raises(ConfigError, match=r"expected SemiSparseWeightConfig\(\) or BlockSparseWeightConfig"):
        sparsify_(model, "2:4")  # type: ignore[arg-type]
    with pytest.raises(NothingToPrune, match=r"filter_fn accepts no nn\.Linear"):
        sparsify_(model, SemiSparseWeightConfig(), filter_fn=lambda module, name: False)
    assert torch.equal(model[0].weight, before) and lookup(model[0].weight) is None
