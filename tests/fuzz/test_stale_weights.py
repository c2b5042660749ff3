"""Weights that change after compile, in any order and by any means: a call never uses an old pack.

Each failure prints the list of changes that reproduces it.
"""

from __future__ import annotations

import copy
import os

import pytest
import torch
from fxprune.lowering.kernels import KernelTables
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import fxprune
from tests.oracle import assert_model, compiled, integer_model, integers, zero_some

LONG = int(os.environ.get("FXPRUNE_FUZZ", "0"))
FUZZ = settings(
    max_examples=LONG or 25,
    deadline=None,
    derandomize=not LONG,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),
)
CHANGES = (
    "scale",
    "set_data",
    "load_state_dict",
    "load_assign",
    "new_parameter",
    "sgd",
    "adam",
    "adam_fused",
    "data_edit_and_refresh",
    "more_zeros",
    "fill_in",
    "fill_in_and_refresh",
    "statistics",
    "bias",
    "prune",
)


class Net(nn.Module):
    """A separable block with BatchNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.dw = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.pw = nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(16, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pw(torch.relu(self.bn(self.dw(x))))
        return self.head(x.amax((2, 3)))


def build() -> Net:
    return zero_some(integer_model(Net()))


def change(model: Net, how: str, seed: int) -> None:
    """Change one weight of ``model`` (or all of them) in one of the ways users do."""
    weight = [model.dw, model.pw, model.head][seed % 3].weight
    zeros = weight.detach() == 0
    if how in ("sgd", "adam", "adam_fused"):
        step(model, how, seed)
    elif how == "prune":
        fxprune.prune(model, x_of(seed), sparsity=0.7, inplace=True, granularity=4)
    elif how == "load_state_dict":
        model.load_state_dict(fresh(model, seed).state_dict())
    elif how == "load_assign":
        model.load_state_dict(fresh(model, seed).state_dict(), assign=True)
    elif how == "new_parameter":
        model.pw.weight = nn.Parameter(-2 * model.pw.weight.detach())
    elif how == "set_data":
        weight.data = integers(*weight.shape, seed=seed).masked_fill(zeros, 0)
    elif how.startswith("data_edit"):
        weight.data.mul_(-1)
        assert fxprune.refresh(model) >= 0
    elif how == "fill_in_and_refresh":
        weight.data.add_(1)
        fxprune.refresh(model)
    else:
        with torch.no_grad():
            change_in_place(model, weight, how, seed)


def change_in_place(model: Net, weight: nn.Parameter, how: str, seed: int) -> None:
    if how == "scale":
        weight.mul_(-1 if seed % 2 else 2).clamp_(-8, 8)
    elif how == "more_zeros":
        weight[:, ::2] = 0
        weight[seed % 8] = 1
    elif how == "fill_in":
        weight.add_(1)
    elif how == "statistics":
        model.bn.running_mean.add_(1)
        model.bn.bias.add_(2)
    elif how == "bias":
        model.pw.bias.add_(1)


def step(model: Net, how: str, seed: int) -> None:
    if how == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.125, fused=how == "adam_fused")
    for parameter in model.parameters():
        parameter.grad = integers(*parameter.shape, seed=seed, low=-1, high=1)
    optimizer.step()
    optimizer.zero_grad()


def fresh(model: Net, seed: int) -> Net:
    return zero_some(integer_model(copy.deepcopy(model), seed + 1), seed)


def x_of(seed: int) -> torch.Tensor:
    return integers(2, 8, 5, 5, seed=seed)


@pytest.mark.fuzz
@FUZZ
@given(st.lists(st.tuples(st.sampled_from(CHANGES), st.integers(0, 9)), min_size=1, max_size=6))
def test_output_always_equals_the_dense_model(changes: list[tuple[str, int]]) -> None:
    run(changes)


@pytest.mark.parametrize("how", CHANGES)
def test_each_change_alone_and_twice(how: str) -> None:
    run([(how, 0), (how, 1), (how, 2)])


def run(changes: list[tuple[str, int]]) -> None:
    torch._dynamo.reset()
    model = build()
    fast = compiled(model)
    with torch.no_grad():
        assert_model(fast.call(x_of(0)), model, (x_of(0),))
    assert fast.contexts and all(d.chosen for d in fast.contexts[0].decisions), "MISTRUSTED: nothing runs sparse"
    done = []
    for i, (how, seed) in enumerate(changes):
        change(model, how, seed)
        done.append((how, seed))
        for call in range(2):  # the call that notices, and the one after the repack
            x = x_of(10 * i + call)
            with torch.no_grad():
                assert_model(fast.call(x), model, (x,), f"run({done}), call {call}", trusted=False)


def test_a_failed_rebuild_never_leaves_an_old_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    model = build()
    fast = compiled(model, require_sparse=True)
    with torch.no_grad():
        assert_model(fast.call(x_of(0)), model, (x_of(0),))
        with monkeypatch.context() as patch:
            patch.setattr(KernelTables, "supports", lambda *_: "no kernel, for this test")
            model.head.weight.masked_fill_(model.head.weight == 0, 1)
            for call in range(3):
                assert_model(fast.call(x_of(call)), model, (x_of(call),))
        model.pw.weight.neg_()
        assert_model(fast.call(x_of(5)), model, (x_of(5),))
