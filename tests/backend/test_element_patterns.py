"""Every pattern planned, compiled and trained on small models: bit for bit what the masked dense model computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.plan import lookup
from tests.oracle import assert_exact, check, compiled, integer_model, integers, rewritten

NAMES = ("tile", "unstructured", "2:4", "3:7", "block:8x16", "tvw", "tvw:1:2", "tew", "tew:0.15")
IMAGE, ROWS = integers(2, 24, 5, 7, seed=3), integers(5, 40, seed=4)


def sparsity(name: str) -> float | None:
    return None if name[0].isdigit() else 0.7


def pointwise() -> nn.Module:
    return distinct(nn.Sequential(nn.Conv2d(24, 48, 1), nn.ReLU(), nn.Conv2d(48, 21, 1, bias=False)))


def linear() -> nn.Module:
    return distinct(nn.Sequential(nn.Linear(40, 150), nn.ReLU(), nn.Linear(150, 33)))


def distinct(model: nn.Module) -> nn.Module:
    """Integers without zeros, so that only what was pruned is zero."""
    integer_model(model)
    for i, parameter in enumerate(model.parameters()):
        sign = integers(*parameter.shape, seed=i, low=0, high=1) * 2 - 1
        parameter.data.copy_(sign * integers(*parameter.shape, seed=50 + i, low=1, high=3))
    return model


MODELS = {"pointwise": (pointwise, IMAGE), "linear": (linear, ROWS)}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", MODELS)
def test_planned_and_compiled(kind: str, name: str) -> None:
    build, x = MODELS[kind]
    model = fxprune.prune(build(), x, sparsity=sparsity(name), pattern=name, inplace=True).model
    run = check(model, x)
    assert run.ops["tile_gemm"] >= 2 and not run.ops["linear"] and not run.ops["conv2d"]
    assert [d.pattern for d in run.context.decisions] == [name, name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", MODELS)
def test_found_without_the_plan(kind: str, name: str) -> None:
    build, x = MODELS[kind]
    pruned = fxprune.prune(build(), x, sparsity=sparsity(name), pattern=name).model
    model = build()
    model.load_state_dict(pruned.state_dict())
    run = check(model, x)
    assert run.ops["tile_gemm"] == 2
    assert all(d.pattern.startswith("found ") for d in run.context.decisions)
    for decision in run.context.decisions:
        assert decision.mask is not None
        zero = decision.match.matrix(decision.match.value.detach()) == 0
        assert not bool((~zero & ~decision.mask.mask).any()), "a cover keeps every non-zero"


@pytest.mark.parametrize("name", NAMES)
def test_pruned_inside_the_compile(name: str) -> None:
    if sparsity(name) is None:
        pytest.skip("the compile prunes only what a sparsity asks for")
    model = linear()
    oracle = fxprune.prune(copy.deepcopy(model), ROWS, sparsity=0.7, pattern=name).model
    run = rewritten(model, ROWS, sparsity=0.7, pattern=name)
    with torch.no_grad():
        assert_exact(run.output, (oracle(ROWS),), name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_the_masked_model(kind: str, name: str) -> None:
    build, x = MODELS[kind]
    model = fxprune.prune(build(), x, sparsity=sparsity(name), pattern=name, inplace=True).model.train()
    masks = {key: lookup(p).mask for key, p in model.named_parameters() if lookup(p) is not None}  # type: ignore[union-attr]
    twin = copy.deepcopy(model)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    fast = compiled(model)
    given, expected = fast.call(inputs[0]), twin(inputs[1])
    assert_exact(given.detach(), expected.detach(), name)
    upstream = integers(*given.shape, seed=5)
    given.backward(upstream)
    expected.backward(upstream)
    assert_exact(inputs[0].grad, inputs[1].grad, name)
    for (key, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert isinstance(a.grad, Tensor) and isinstance(b.grad, Tensor)
        assert_exact(a.grad, b.grad * masks[key] if key in masks else b.grad, f"{name} {key}", trusted=False)
    assert all(d.chosen for d in fast.contexts[0].decisions)


def test_an_overlay_runs_as_two_kernels_that_follow_the_weight() -> None:
    dense, rows = distinct(nn.Sequential(nn.Linear(256, 384), nn.ReLU(), nn.Linear(384, 256))), integers(96, 256)
    model = fxprune.prune(dense, rows, sparsity=0.7, pattern="tew", columns=False, inplace=True).model.eval()
    run = check(model, rows)
    assert run.ops["tile_gemm"] == 4
    fast = compiled(model)
    for factor in (1.0, 2.0, -1.0):
        with torch.no_grad():
            model[0].weight.mul_(factor)
            assert_exact(fast.call(rows), model(rows), f"times {factor}")
    with torch.no_grad():
        model[0].weight.fill_(1.0)  # no longer what was planned
        assert_exact(fast.call(rows), model(rows), "filled")
