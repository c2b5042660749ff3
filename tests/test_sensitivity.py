"""``fxprune.sensitivity`` and ``max_drop``: the order they find, what they count, and that the model stays."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.calibration import progress
from fxprune.errors import CalibrationError, ConfigError, DropTooLarge, FxPruneError, MissingCalibration, UnknownLayer
from fxprune.plan import lookup
from fxprune.search import largest_scale
from tests.oracle import integers
from tests.toys import image, mobile, rows


class Three(nn.Module):
    """One layer is essential, one counts a little, one is irrelevant; all have weights of one kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.irrelevant, self.small, self.essential = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return 0.0 * self.irrelevant(x) + 0.01 * self.small(x) + self.essential(x)


X = integers(16, 32)


def layers(report: Any) -> list[str]:
    return [row["layer"] for row in report.to_dict()["rows"]]


def closeness(model: nn.Module) -> Any:
    """Return a metric, higher is better, 0 for ``model`` as it is."""
    with torch.no_grad():
        expected = model(X)
    return lambda network: -(network(X) - expected).square().mean()


@pytest.mark.parametrize("measure", ["eval_fn", "calibration"])
def test_the_essential_layer_comes_first(measure: str) -> None:
    model = Three()
    given = {"eval_fn": closeness(model)} if measure == "eval_fn" else {"calibration": [X[:8], X[8:]]}
    report = fxprune.sensitivity(model, X, sparsities=(0.25, 0.75), **given)
    assert layers(report) == ["essential", "small", "irrelevant"]
    table = {row["layer"]: row for row in report.to_dict()["rows"]}
    assert table["irrelevant"]["sensitivity"] == 0 and table["irrelevant"]["kind"] == "linear"
    sign = -1 if measure == "eval_fn" else 1
    assert 0 < sign * table["essential"]["0.25"] < sign * table["essential"]["0.75"]
    mean = (sign * table["essential"]["0.25"] + sign * table["essential"]["0.75"]) / 2
    assert table["essential"]["sensitivity"] == pytest.approx(mean, rel=1e-3)


def test_a_cell_is_the_error_with_that_layer_pruned() -> None:
    model = mobile()
    report = fxprune.sensitivity(model, image(), calibration=[image(seed=3)], sparsities=(0.5,))
    for row in report.to_dict()["rows"]:
        alone = fxprune.prune(model, image(), sparsity={row["layer"]: 0.5}).model
        with torch.no_grad():
            y, given = model(image(seed=3)), alone(image(seed=3))
        assert row["0.5"] == pytest.approx(((given - y).norm() / y.norm()).item(), rel=1e-3), row["layer"]


def test_without_data_a_cell_is_the_importance_that_is_lost() -> None:
    model = mobile()
    report = fxprune.sensitivity(model, image(), sparsities=(0.5,), importance="l2")
    assert report.summary == {"measured": "share of importance lost"}
    for row in report.to_dict()["rows"]:
        alone = fxprune.prune(model, image(), sparsity={row["layer"]: 0.5}, importance="l2").model
        before, after = (m.get_submodule(row["layer"]).weight.square().sum().item() for m in (model, alone))
        assert row["0.5"] == pytest.approx(1 - after / before, rel=1e-3)
    data = fxprune.sensitivity(model, image(), importance="wanda", calibration=[image()], sparsities=(0.5,))
    assert data.summary == {"measured": "relative error of the model's outputs"}


def test_groups_and_options() -> None:
    model = Three()
    report = fxprune.sensitivity(model, X, sparsities=(0.5,), groups={"both": ["irrel*", "essential"]})
    assert set(layers(report)) == {"both", "small"}
    assert {row["weights"] for row in report.to_dict()["rows"]} == {2048, 1024}
    assert layers(fxprune.sensitivity(model, X, ignored_layers=("essential", "small"))) == ["irrelevant"]
    assert layers(fxprune.sensitivity(model, X, filter_fn=lambda _, name: name == "small")) == ["small"]
    assert set(layers(fxprune.sensitivity(mobile(), image(), pattern="dcp"))) == {"dw"}


def test_a_shared_weight_is_one_row() -> None:
    model = Three()
    model.small.weight = model.essential.weight
    found = layers(fxprune.sensitivity(model, X, sparsities=(0.5,)))
    assert len(found) == 2 and "irrelevant" in found


def test_the_report_is_data() -> None:
    report = fxprune.sensitivity(Three(), X, eval_fn=closeness(Three()), sparsities=(0.5, 0.875))
    data = json.loads(report.to_json())
    assert set(data["rows"][0]) == {"layer", "kind", "weights", "0.5", "0.875", "sensitivity"}
    assert data["summary"] == {"measured": "eval_fn", "dense": 0.0}
    assert report.to_markdown().startswith("| layer |") and "essential" in str(report)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_never_changed(fails: bool) -> None:
    model = mobile().train()
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    seen: list[nn.Module] = []

    def evaluate(network: nn.Module) -> float:
        seen.append(network)
        if fails and len(seen) == 3:
            raise RuntimeError("stop here")
        network.eval()
        torch.rand(2)
        return 1.0

    state = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="stop here"):
            fxprune.sensitivity(model, image(), eval_fn=evaluate)
    else:
        fxprune.sensitivity(model, image(), eval_fn=evaluate)
        assert len(seen) == 1 + 3 * 4
    assert model not in seen and torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(lookup(p) for p in model.parameters())


BAD: dict[str, tuple[type[FxPruneError], str, dict[str, Any]]] = {
    "sparsity": (ConfigError, "'sparsity' got 0.5; expected sparsities=", {"sparsity": 0.5}),
    "one number": (ConfigError, "'sparsities' got 0.5", {"sparsities": 0.5}),
    "none": (ConfigError, "'sparsities' got", {"sparsities": ()}),
    "all zeros": (ConfigError, "'sparsities' got", {"sparsities": (0.5, 1.0)}),
    "eval_fn": (ConfigError, "'eval_fn' got 3", {"eval_fn": 3}),
    "nothing": (ConfigError, "'eval_fn' got 'the result None'", {"eval_fn": lambda _: None}),
    "NaN": (ConfigError, "'eval_fn' got 'the result nan'", {"eval_fn": lambda _: float("nan")}),
    "group": (
        ConfigError,
        r"groups\['g'\].* got 'smal'; expected layers among irrelevant, small",
        {"groups": {"g": ["smal"]}},
    ),
    "two groups": (ConfigError, "'groups' got 'small'", {"groups": {"g": ["small"], "h": ["s*"]}}),
    "ignored": (UnknownLayer, "did you mean 'small'", {"ignored_layers": ("smal",)}),
    "importance": (MissingCalibration, "importance='wanda'", {"importance": "wanda"}),
    "calibration": (CalibrationError, "it holds no batch", {"calibration": []}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    error, message, options = BAD[name]
    with pytest.raises(error, match=message):
        fxprune.sensitivity(Three(), X, **options)


def test_outputs_without_numbers() -> None:
    class Labels(Three):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(1)

    with pytest.raises(CalibrationError, match="no floating-point tensor"):
        fxprune.sensitivity(Labels(), X, calibration=[X])


@pytest.mark.parametrize("inplace", [False, True])
def test_max_drop_finds_the_largest_share(inplace: bool) -> None:
    model = Three()
    reference, calls = closeness(copy.deepcopy(model)), []

    def evaluate(network: nn.Module) -> float:
        assert network is not model
        calls.append(float(reference(network).detach()))
        return calls[-1]

    result = fxprune.prune(model, X, sparsity={"linear": 0.9}, eval_fn=evaluate, max_drop=0.2, inplace=inplace)
    found = result.search
    assert found.evaluations == len(calls) == 9 and found.dense == 0.0
    assert 0 < found.scale < 1 and found.metric >= -0.2
    assert float(reference(result.model).detach()) == pytest.approx(found.metric)
    assert (result.model is model) is inplace
    assert result.sparsity["linear"] == pytest.approx(0.9 * found.scale, abs=0.02)
    more = fxprune.prune(Three(), X, sparsity=min(0.9 * found.scale + 0.05, 0.9)).model
    assert float(reference(more).detach()) < -0.2
    assert result.report.summary["search evaluations"] == 9


def test_max_drop_that_allows_everything_takes_two_evaluations() -> None:
    result = fxprune.prune(Three(), X, sparsity=0.5, eval_fn=lambda _: 1, max_drop=0)
    assert (result.search.scale, result.search.evaluations, result.sparsity["all"]) == (1.0, 2, 0.5)
    assert fxprune.prune(Three(), X, sparsity=0.5).search is None


def test_max_drop_works_with_refitting() -> None:
    model = Three()
    options: dict[str, Any] = {"sparsity": 0.9, "eval_fn": closeness(model), "max_drop": 0.1}
    plain = fxprune.prune(model, X, **options)
    fitted = fxprune.prune(model, X, calibration=[X], compensate=True, **options)
    assert fitted.search.scale > plain.search.scale


def test_max_drop_that_nothing_meets_changes_nothing() -> None:
    model = Three()
    before = copy.deepcopy(model.state_dict())
    values = iter([1.0] + [0.0] * 8)
    with pytest.raises(DropTooLarge, match=r"max_drop=0.5: dense 1, and 0 at 0.8% of the sparsity"):
        fxprune.prune(model, X, sparsity=0.5, eval_fn=lambda _: next(values), max_drop=0.5, inplace=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_bisection_is_that_of_a_falling_metric() -> None:
    tried: list[float] = []
    best, found = largest_scale(lambda scale: tried.append(scale) or scale, lambda s: 0.0 if s is None else -s, 0.3)
    assert tried[:3] == [1.0, 0.5, 0.25] and len(tried) == 8
    assert best == found.scale == max(s for s in tried if s <= 0.3) and abs(best - 0.3) < 1 / 64


SEARCH: dict[str, tuple[str, dict[str, Any]]] = {
    "no function": ("'max_drop' got 0.1; expected eval_fn=", {"max_drop": 0.1}),
    "no bound": ("'eval_fn' got .* expected max_drop= beside it", {"eval_fn": lambda _: 1.0}),
    "no callable": ("'eval_fn' got 3", {"eval_fn": 3, "max_drop": 0.1}),
    "negative": ("'max_drop' got -1", {"eval_fn": lambda _: 1.0, "max_drop": -1}),
    "NaN": ("'max_drop' got nan", {"eval_fn": lambda _: 1.0, "max_drop": float("nan")}),
    "text": ("'max_drop' got '1%'", {"eval_fn": lambda _: 1.0, "max_drop": "1%"}),
    "no number": ("the result 'good'", {"eval_fn": lambda _: "good", "max_drop": 0.1}),
}


@pytest.mark.parametrize("name", SEARCH)
def test_a_bad_search_is_named(name: str) -> None:
    message, options = SEARCH[name]
    with pytest.raises(ConfigError, match=message):
        fxprune.prune(Three(), X, sparsity=0.5, **options)


def test_progress_is_silent_away_from_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    items = [1, 2]
    assert progress(items, "work") is items
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert list(progress(items, "work")) == items
    assert rows().shape and not capsys.readouterr().err.strip()
