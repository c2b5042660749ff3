"""What a Pruner saves, loads, and refuses to."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fxprune import CubicSchedule, Pruner
from fxprune.errors import ConfigError, StateMismatch
from tests.pruning_loops import convs, image, mlp, rows, train

FINAL = 0.75


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_a_run_resumes_bit_for_bit(importance: str) -> None:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer, Pruner]:
        model = mlp()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        schedule = CubicSchedule(0, 12, 3)
        return model, optimizer, Pruner(model, rows(), sparsity=FINAL, schedule=schedule, importance=importance, growth=True)

    model, optimizer, pruner = begin()
    train(model, optimizer, pruner, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}, file)
    train(model, optimizer, pruner, range(5, 15))
    expected = pruner.finalize()

    other, again, resumed = begin()
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state["model"])
    again.load_state_dict(state["optimizer"])
    resumed.load_state_dict(state["pruner"])
    assert resumed.steps == 5
    train(other, again, resumed, range(5, 15))
    result = resumed.finalize()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert result.plan.to_dict() == expected.plan.to_dict()
    for a, b in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_state_of_another_model_is_refused_and_nothing_changes() -> None:
    model, other = mlp(), convs()
    pruner, wrong = Pruner(model, rows(), sparsity=0.5), Pruner(other, image(), sparsity=0.5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateMismatch, match="cannot be loaded"):
        pruner.load_state_dict(wrong.state_dict())
    with pytest.raises(StateMismatch, match="version: got 9, expected 1"):
        pruner.load_state_dict({"version": 9})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("granularity"), "parts: got no 'granularity'"),
        (lambda state: state["patterns"].popitem(), "got none, expected 'patterns' beside its mask"),
        (lambda state: state["scores"].update({"0.weight": torch.zeros(2, 2)}), r"scores of '0\.weight': got \(2, 2\)"),
        (lambda state: state["structures"].update({"0.weight": torch.zeros(2)}), r"structures of '0\.weight': got \(2,\)"),
        (lambda state: state["before"].clear(), "'before' beside its mask, of a Pruner with growth=True"),
        (lambda state: state["layers"]["0.weight"].pop("shape"), "shape"),
    ],
)
def test_a_broken_state_is_refused_and_nothing_changes(change: Callable[[Any], Any], message: str) -> None:
    model = mlp()
    pruner = Pruner(model, rows(), sparsity=0.5, growth=True)
    saved = Pruner(mlp(), rows(), sparsity=0.75, growth=True).state_dict()
    saved["step"] = 3
    change(saved)
    before, weights = pruner.state_dict(), copy.deepcopy(model.state_dict())
    with pytest.raises((StateMismatch, KeyError), match=message):
        pruner.load_state_dict(saved)
    after = pruner.state_dict()
    assert pruner.steps == 0 and after["layers"] == before["layers"]
    assert all(torch.equal(mask, before["masks"][name]) for name, mask in after["masks"].items())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_a_pruner_is_not_copied_nor_stepped_when_it_is_done() -> None:
    model = mlp()
    pruner = Pruner(model, rows(), sparsity=0.5)
    with pytest.raises(ConfigError, match="a copy or a pickle"):
        copy.deepcopy(pruner)
    result = pruner.finalize()
    with pytest.raises(ConfigError, match=r"plan\.hold"):
        pruner.step()
    assert result.plan.to_dict() == pruner.finalize().plan.to_dict()
