"""The plan: metadata beside the zeros, a weak registry, and ``hold``."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch

import fxprune
from fxprune import plan
from fxprune.errors import NothingToPrune
from fxprune.prune import PruneResult
from tests.toys import image, mlp, mobile, rows


def test_masks_are_the_zeros_of_the_weights() -> None:
    result = fxprune.prune(mobile(), image(), sparsity=0.5)
    parameters = dict(result.model.named_parameters())
    assert len(result.plan) == 3
    for layer in result.plan:
        pruned = plan.lookup(parameters[layer.parameter])
        assert pruned.pattern == layer.pattern and pruned.mask.shape == parameters[layer.parameter].shape == layer.shape
        assert not parameters[layer.parameter].detach()[~pruned.mask].any()
        assert layer.sparsity == pytest.approx(1 - pruned.mask.float().mean().item())


def test_the_registry_is_weak() -> None:
    result = fxprune.prune(mlp(), rows(), sparsity=0.5)
    weight = weakref.ref(result.model[0].weight)
    before = len(plan._REGISTRY)
    del result
    gc.collect()
    assert weight() is None and len(plan._REGISTRY) < before


def test_a_deepcopy_has_the_zeros_but_no_plan() -> None:
    model = fxprune.prune(mlp(), rows(), sparsity=0.5).model
    twin = copy.deepcopy(model)
    assert torch.equal(twin[0].weight, model[0].weight)
    assert plan.lookup(twin[0].weight) is None and plan.lookup(model[0].weight) is not None


def test_generation_rises_with_every_mask() -> None:
    before = plan.generation()
    fxprune.prune(mlp(), rows(), sparsity=0.5)
    assert plan.generation() == before + 2


def test_hold_needs_a_pruned_parameter() -> None:
    result = fxprune.prune(mlp(), rows(), sparsity=0.5)
    with pytest.raises(NothingToPrune, match=r"holds no parameter of the pruned model. Create it from result.model"):
        result.plan.hold(torch.optim.SGD(mlp().parameters(), lr=0.1))


def test_hold_projects_at_once_and_stops_with_its_handle() -> None:
    result = fxprune.prune(mlp(), rows(), sparsity=0.5)
    weight = result.model[0].weight
    mask = plan.lookup(weight).mask
    weight.data.fill_(1.0)
    optimizer = torch.optim.SGD(result.model.parameters(), lr=0.0)
    handle = result.plan.hold(optimizer)
    assert torch.equal(weight != 0, mask)
    weight.data.fill_(1.0)
    handle.remove()
    optimizer.step()
    assert weight.all()


def test_json_is_stable_and_complete() -> None:
    layers = json.loads(fxprune.prune(mobile(), image(), sparsity=0.5).plan.to_json())["layers"]
    names = "name parameter kind pattern shape target sparsity granularity counts columns note"
    assert [list(layer) for layer in layers] == [names.split()] * 3
    assert [layer["kind"] for layer in layers] == ["depthwise", "pointwise", "linear"]
    assert layers[1]["columns"] is None and layers[2]["shape"] == [24, 32]


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda r: pickle.loads(pickle.dumps(r))], ids=["copied", "pickled"])
def test_a_copied_result_holds_its_own_model(copy_of: Callable[[PruneResult], PruneResult]) -> None:
    first = fxprune.prune(mlp(), rows(), sparsity=0.5)
    result = copy_of(first)
    del first
    optimizer = torch.optim.SGD(result.model.parameters(), 0.5, momentum=0.9)
    result.plan.hold(optimizer)
    result.model(rows()).square().sum().backward()
    before = {name: result.model.get_parameter(name).clone() for name in result.plan.weights}
    optimizer.step()
    for name, pruned in result.plan.weights.items():
        weight = result.model.get_parameter(name)
        assert not weight[~pruned.mask].any() and not torch.equal(weight, before[name])
