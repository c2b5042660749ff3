"""``fxprune.prune``: what it writes, what it leaves alone, and that an error changes nothing."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import (
    CaptureError,
    ConfigError,
    FxPruneError,
    NonFiniteWeight,
    NothingToPrune,
    UnknownLayer,
    UnknownPattern,
)
from fxprune.plan import lookup
from fxprune.sparsity import get
from tests.toys import image, mlp, mobile, rows


def wide(seed: int = 0) -> nn.Module:
    """Large enough for half a point: depthwise, 1x1 and linear layers."""
    torch.manual_seed(seed)
    layers = (
        nn.Conv2d(96, 96, 3, padding=1, groups=96),
        nn.BatchNorm2d(96),
        nn.ReLU6(),
        nn.Conv2d(96, 192, 1),
        nn.ReLU(),
        nn.Conv2d(192, 192, 5, padding=2, groups=192),
        nn.Conv2d(192, 128, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 256),
    )
    return nn.Sequential(*layers).eval()


WIDE = torch.ones(1, 96, 8, 8)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(v, right[k]) for k, v in left.items())


def test_a_copy_unless_in_place() -> None:
    model = mobile()
    before = state(model)
    result = fxprune.prune(model, image(), sparsity=0.5)
    assert result.model is not model and same(state(model), before)
    assert not any(lookup(p) for p in model.parameters()) and any(lookup(p) for p in result.model.parameters())
    again = fxprune.prune(model, image(), sparsity=0.5, inplace=True)
    assert again.model is model and same(state(model), state(result.model))


def test_the_model_stays_a_plain_module() -> None:
    model = mobile()
    result = fxprune.prune(model, image(), sparsity=0.5)
    assert type(result.model) is type(model) and list(result.model.state_dict()) == list(model.state_dict())
    for a, b in zip(model.parameters(), result.model.parameters(), strict=True):
        assert type(b) is nn.Parameter and a.shape == b.shape and a.requires_grad == b.requires_grad
        assert torch.equal(b, a * (b != 0)), "a weight is kept as it is, or zero"
    hooks = [m for m in result.model.modules() if m._forward_hooks or m._forward_pre_hooks or hasattr(m, "parametrizations")]
    assert not hooks


@pytest.mark.parametrize("target", [0.25, 0.5, 0.62, 0.78, 0.9])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_achieved_sparsity_is_within_half_a_point(target: float, scope: str) -> None:
    result = fxprune.prune(wide(), WIDE, sparsity=target, scope=scope)
    assert set(result.sparsity) == {"all", "depthwise", "pointwise", "linear"}
    for key, value in result.sparsity.items():
        assert abs(value - target) <= 0.005, (key, value)
    zeros = sum((p == 0).sum().item() for p in result.model.parameters() if lookup(p))
    total = sum(p.numel() for p in result.model.parameters() if lookup(p))
    assert result.sparsity["all"] == pytest.approx(zeros / total)


def test_counts_are_legal_and_nothing_is_emptied() -> None:
    for target in (0.3, 0.78, 0.98):
        result = fxprune.prune(wide(), WIDE, sparsity=target)
        for layer in result.plan:
            planned = lookup(dict(result.model.named_parameters())[layer.parameter])
            pattern, tiling = get(layer.pattern), planned.layer.tiling
            step = 2 if layer.pattern == "dcp" else 1
            for tile, count in enumerate(layer.counts):
                assert count >= 1 and pattern.legal_counts(tiling, tile, step).legal(count), (
                    target,
                    layer.name,
                    tile,
                    count,
                )
            assert planned.mask.any() and len(layer.counts) == tiling.tiles


def test_ties_are_deterministic_and_go_to_the_lower_index() -> None:
    def constant() -> nn.Module:
        model = wide()
        for parameter in model.parameters():
            nn.init.constant_(parameter, 1.0)
        return model

    first, second = (fxprune.prune(constant(), WIDE, sparsity=0.5) for _ in range(2))
    assert same(state(first.model), state(second.model)) and first.plan.to_json() == second.plan.to_json()
    kept = first.model[0].weight[:32].flatten() != 0
    assert kept[: int(kept.sum())].all(), "the lower indices of a group stay"


def test_sparsity_by_kind_and_by_glob() -> None:
    result = fxprune.prune(wide(), WIDE, sparsity={"depthwise": 0.78, "pointwise": 0.5, "5": 0.5, "9*": 0.75})
    targets = {layer.name: layer.target for layer in result.plan}
    assert targets == {"0": 0.78, "5": 0.5, "3": 0.5, "6": 0.5, "9": 0.75}
    for layer in result.plan:
        assert layer.kind == "depthwise" or abs(layer.sparsity - layer.target) <= 0.005, layer.name
    assert result.sparsity["depthwise"] == pytest.approx((864 * 0.78 + 4800 * 0.5) / 5664, abs=0.005)
    assert {"5", "9*", "depthwise", "pointwise", "linear", "all"} == set(result.sparsity)


def test_a_later_glob_wins_and_a_glob_may_name_the_weight() -> None:
    plan = fxprune.prune(wide(), WIDE, sparsity={"*": 0.25, "3.weight": 0.75, "9": 0.0}).plan
    assert {layer.name: layer.target for layer in plan} == {"0": 0.25, "3": 0.75, "5": 0.25, "6": 0.25}


def test_ignored_layers_and_filter_fn() -> None:
    model = wide()
    result = fxprune.prune(model, WIDE, sparsity=0.5, ignored_layers=("3", "9*"))
    assert [layer.name for layer in result.plan] == ["0", "5", "6"]
    assert torch.equal(result.model[3].weight, model[3].weight) and torch.equal(result.model[9].weight, model[9].weight)
    seen: list[tuple[str, str]] = []

    def keep(module: nn.Module, name: str) -> bool:
        seen.append((type(module).__name__, name))
        return isinstance(module, nn.Linear)

    assert [layer.name for layer in fxprune.prune(model, WIDE, sparsity=0.5, filter_fn=keep).plan] == ["9"]
    assert ("Conv2d", "0") in seen and ("Linear", "9") in seen


def test_importance_is_what_is_kept() -> None:
    def inverse(name: str, weight: torch.Tensor) -> torch.Tensor:
        return 1 / (1 + weight.abs())

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(32, 32, 3, groups=32)).eval(), torch.ones(1, 32, 5, 5)
    largest = fxprune.prune(model, x, sparsity=0.5).model[0].weight
    smallest = fxprune.prune(model, x, sparsity=0.5, importance=inverse).model[0].weight
    assert not ((largest != 0) & (smallest != 0)).any()
    assert largest[largest != 0].abs().mean() > 2 * smallest[smallest != 0].abs().mean()


def test_flags_statistics_and_gradients_survive() -> None:
    model = mobile()
    model.train()
    model.bn1.eval()
    model.pw.weight.requires_grad_(False)
    before, flags = state(model), [m.training for m in model.modules()]
    result = fxprune.prune(model, image(), sparsity=0.5)
    assert same(state(model), before), "BatchNorm's statistics are untouched by the capture"
    for network in (model, result.model):
        assert [m.training for m in network.modules()] == flags
        assert [p.requires_grad for p in network.parameters()] == [p is not network.pw.weight for p in network.parameters()]
        assert all(p.grad is None for p in network.parameters())


INPUTS: dict[str, Any] = {"tensor": rows(), "tuple": (rows(),), "list": [rows()], "keywords": {"input": rows()}}


@pytest.mark.parametrize("form", INPUTS)
def test_forms_of_example_inputs(form: str) -> None:
    assert len(fxprune.prune(mlp(), INPUTS[form], sparsity=0.5).plan) == 2


def broken(name: str, weight: torch.Tensor) -> torch.Tensor:
    if name == "2":
        raise ZeroDivisionError("in the user's own function")
    return weight.abs()


ERRORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "sparsity": (ConfigError, "0 <= sparsity < 1", {"sparsity": 1.0}),
    "glob": (UnknownLayer, r"'linaer' in sparsity .* did you mean 'linear'", {"sparsity": {"linaer": 0.5}}),
    "ignored": (UnknownLayer, "'head' in ignored_layers", {"ignored_layers": ("head",)}),
    "pattern": (UnknownPattern, "did you mean 'tile'", {"pattern": "tiel"}),
    "pattern of a kind": (UnknownPattern, "for linear layers", {"pattern": {"linear": "dcp"}}),
    "nothing": (NothingToPrune, "asks nothing of the 2 prunable", {"sparsity": {"depthwise": 0.5}}),
    "filter": (
        NothingToPrune,
        r"no convolution, linear or recurrent layer .* may be pruned \(0: not asked for; 2: not asked for\)",
        {"filter_fn": lambda module, name: False},
    ),
    "importance": (ConfigError, "a tensor of shape", {"importance": lambda name, weight: weight.abs().sum()}),
    "the user's function": (ZeroDivisionError, "own function", {"importance": broken}),
    "inputs": (CaptureError, r"\(4, 31\)", {"example_inputs": torch.ones(4, 31)}),
}


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize("training", [False, True])
def test_an_error_changes_nothing(name: str, training: bool) -> None:
    error, message, given = ERRORS[name]
    model = mlp().train(training)
    before = state(model)
    options = {"example_inputs": rows(), "sparsity": 0.5, **given}
    with pytest.raises(error, match=message):
        fxprune.prune(model, inplace=True, **options)
    assert same(state(model), before) and model.training is training
    assert not any(lookup(p) for p in model.parameters())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights_are_refused_by_name(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[1, 2] = value
    before = model[0].weight.detach().clone()
    with pytest.raises(NonFiniteWeight, match=r"weight '2' holds 1 non-finite .*ignored_layers=\('2',\)"):
        fxprune.prune(model, rows(), sparsity=0.5, inplace=True)
    assert torch.equal(model[0].weight, before)
    assert [layer.name for layer in fxprune.prune(model, rows(), sparsity=0.5, ignored_layers=("2",)).plan] == ["0"]


def test_not_a_module() -> None:
    with pytest.raises(ConfigError, match=r"option 'model' got 'function'; expected a torch.nn.Module"):
        fxprune.prune(lambda x: x, rows(), sparsity=0.5)  # type: ignore[arg-type]


def test_pruning_twice_keeps_the_first_zeros() -> None:
    first = fxprune.prune(wide(), WIDE, sparsity=0.4).model
    second = fxprune.prune(first, WIDE, sparsity=0.7)
    for a, b in zip(first.parameters(), second.model.parameters(), strict=True):
        assert not ((a == 0) & (b != 0)).any()
    assert abs(second.sparsity["depthwise"] - 0.7) <= 0.005


def test_a_single_small_layer_meets_the_target() -> None:
    for target in (0.5, 0.78, 0.85):
        result = fxprune.prune(mobile(), image(), sparsity={"depthwise": target})
        assert abs(result.sparsity["depthwise"] - target) <= 0.008, target


def test_the_report_and_the_plan_are_data() -> None:
    result = fxprune.prune(wide(), WIDE, sparsity=0.5)
    data = json.loads(result.plan.to_json())
    assert data["version"] == 1 and [row["name"] for row in data["layers"]] == [layer.name for layer in result.plan]
    text, rows_ = str(result.report), result.report.to_dict()["rows"]
    for layer, row in zip(result.plan, rows_, strict=True):
        assert layer.name in text and row["layer"] == layer.name and row["sparsity"] == f"{layer.sparsity:.1%}"
    assert (
        result.report.to_markdown().startswith("| layer |")
        and json.loads(result.report.to_json())["title"] == "pruned layers"
    )


def test_many_prunings_of_one_model_do_not_exhaust_dynamo() -> None:
    model = mlp()
    sizes = {len(fxprune.prune(model, rows(), sparsity=0.5).plan) for _ in range(12)}
    assert sizes == {2}
    assert torch.equal(torch.compile(model, backend="eager")(rows()), model(rows()))


def check_error(call: Callable[[], object]) -> None:
    with pytest.raises(FxPruneError):
        call()


def test_options_and_copies_do_not_leak_between_calls() -> None:
    model = mobile()
    check_error(lambda: fxprune.prune(model, image(), sparsity=0.5, pattern="tiel"))
    twin = copy.deepcopy(model)
    left, right = fxprune.prune(model, image(), sparsity=0.5), fxprune.prune(twin, image(), sparsity=0.5)
    assert same(state(left.model), state(right.model))
