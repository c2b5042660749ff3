"""Each importance against a computation by hand, and what it needs; the model is as it was, whatever happens."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.calibration import Calibration, preserved
from fxprune.config import Config
from fxprune.errors import CalibrationError, ConfigError, MissingCalibration
from fxprune.importance import calibrate, element_scores, taylor, wanda
from fxprune.match import Match
from fxprune.prunable import contexts_of, prunable
from tests.oracle import integers
from tests.toys import OneOrBoth, image, mlp, mobile, rows


def found(model: nn.Module, x: Any) -> dict[str, Match]:
    return {m.parameter: m for m in prunable(model, contexts_of(model, x, Config()))}


def scores(model: nn.Module, x: Any, **options: Any) -> dict[str, Tensor]:
    return {name: element_scores(m, Config(**options)) for name, m in found(model, x).items()}


def test_scores_without_data() -> None:
    model = mobile()
    weights = dict(model.named_parameters())
    for name, score in scores(model, image(), importance="magnitude").items():
        assert torch.equal(score, weights[name].detach().abs())
        assert torch.equal(score, scores(model, image(), importance="l1")[name])
        assert torch.equal(scores(model, image(), importance="l2")[name], weights[name].detach() ** 2)


def test_random_scores_depend_on_the_seed_and_the_layer_alone() -> None:
    models = mobile(), mobile(), mobile(1)
    state = torch.get_rng_state()
    first, again = (scores(model, image(), importance="random") for model in models[:2])
    other = scores(models[2], image(), importance="random", seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    for name, score in first.items():
        assert score.shape == dict(mobile().named_parameters())[name].shape and len(score.unique()) > score.numel() // 2
        assert torch.equal(score, again[name]) and not torch.equal(score, other[name])


def test_taylor_is_the_squared_product_summed_over_batches() -> None:
    model = mlp()
    data = [(rows(5, seed), torch.arange(5) % 16) for seed in (1, 2, 3)]
    given = taylor(model, list(found(model, rows()).values()), Calibration(data, F.cross_entropy))
    by_hand = {"0.weight": torch.zeros(64, 32), "2.weight": torch.zeros(16, 64)}
    for x, y in data:
        hidden = F.relu(x @ model[0].weight.t() + model[0].bias)
        logits = hidden @ model[2].weight.t() + model[2].bias
        delta = (logits.softmax(1) - F.one_hot(y, 16)) / len(y)  # the gradient of the mean cross entropy
        by_hand["2.weight"] += (delta.t() @ hidden * model[2].weight).detach() ** 2
        back = (delta @ model[2].weight) * (hidden > 0)
        by_hand["0.weight"] += (back.t() @ x * model[0].weight).detach() ** 2
    for name, expected in by_hand.items():
        torch.testing.assert_close(given[name], expected, rtol=1e-4, atol=1e-6)


class WithLoss(nn.Module):
    """Returns what transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.fc(x)
        return {"logits": logits, **({} if labels is None else {"loss": F.cross_entropy(logits, labels)})}


def test_taylor_takes_the_loss_of_the_output() -> None:
    model = WithLoss()
    x, labels = integers(6, 8), torch.arange(6) % 4
    batch = {"x": x, "labels": labels}
    given = taylor(model, list(found(model, x).values()), Calibration([batch]))["fc.weight"]
    loss = F.cross_entropy(model.fc(x), labels)
    (gradient,) = torch.autograd.grad(loss, [model.fc.weight])
    torch.testing.assert_close(given, ((gradient * model.fc.weight) ** 2).detach())
    assert (
        fxprune.prune(model, x, sparsity=0.5, importance="taylor", calibration=[batch], columns=False).sparsity["all"] == 0.5
    )


def test_wanda_weighs_by_the_norm_of_the_input() -> None:
    model = mobile()
    batches = [image(seed=seed) for seed in (3, 4)]
    given = wanda(model, list(found(model, image()).values()), Calibration(batches))
    x = torch.cat(batches)
    hidden = model.act(model.bn1(model.dw(x)))
    pooled = model.bn2(model.pw(hidden)).mean((2, 3))
    norms = [t.double().square().sum(d).sqrt().float() for t, d in ((x, (0, 2, 3)), (hidden, (0, 2, 3)), (pooled, 0))]
    torch.testing.assert_close(given["dw.weight"], (model.dw.weight.abs() * norms[0][:, None, None, None]).detach())
    torch.testing.assert_close(given["pw.weight"], (model.pw.weight.abs() * norms[1][None, :, None, None]).detach())
    torch.testing.assert_close(given["fc.weight"], (model.fc.weight.abs() * norms[2]).detach())


class Twice(nn.Module):
    """One weight used as a module and as a function, and a weight that is stored (K, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8, bias=False)
        self.stored_kn = nn.Parameter(integers(8, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.a(x), self.a.weight) @ self.stored_kn


def test_wanda_adds_up_over_calls_and_knows_the_orientation() -> None:
    model, x = Twice(), integers(5, 8, seed=3)
    given = wanda(model, list(found(model, x).values()), Calibration([x]))
    once = model.a(x)
    norms = torch.cat([x, once]).double().square().sum(0).sqrt().float()
    torch.testing.assert_close(given["a.weight"], (model.a.weight.abs() * norms).detach())
    last = model.a(once).double().square().sum(0).sqrt().float()
    torch.testing.assert_close(given["stored_kn"], (model.stored_kn.abs() * last[:, None]).detach())


@pytest.mark.parametrize("importance", ["taylor", "wanda"])
def test_pruning_follows_the_data(importance: str) -> None:
    """Inputs that are never on cannot matter, however large their weights are."""
    model = nn.Sequential(nn.Linear(32, 64, bias=False))
    with torch.no_grad():
        model[0].weight[:, :16] *= 100
    x = integers(20, 32)
    x[:, :16] = 0
    result = fxprune.prune(
        model,
        x,
        sparsity=0.5,
        importance=importance,
        columns=False,
        calibration=[(x, None)],
        loss_fn=lambda output, _: output.square().mean(),
    )
    kept = result.model[0].weight != 0
    assert not kept[:, :16].any() and kept[:, 16:].all()


def busy() -> nn.Module:
    """A model with everything that must come back: flags, statistics, gradients, a counter, dropout."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mobile()
            self.drop = nn.Dropout(0.5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            torch.rand(3)
            return self.drop(self.body(x))

    model = Counting().train()
    model.body.bn2.eval()
    model.body.pw.weight.requires_grad_(False)
    model.body.fc.weight.grad = torch.ones(24, 32)
    return model


def failing(output: Tensor, target: Tensor) -> Tensor:
    raise RuntimeError("stop here")


@pytest.mark.parametrize("importance", ["taylor", "wanda"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(importance: str, fails: bool) -> None:
    model = busy()
    matches = list(found(model, image()).values())
    before, flags = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    buffers, gradients = dict(model.named_buffers()), [p.requires_grad for p in model.parameters()]
    random = torch.get_rng_state()
    bad = [(image(), torch.zeros(2).long()), (torch.ones(1, 3), torch.zeros(1).long())]
    data = Calibration(bad if fails else bad[:1], F.cross_entropy)
    measure = taylor if importance == "taylor" else wanda
    if fails:
        with pytest.raises(CalibrationError, match=r"the model failed on batch 1 of \[\(1, 3\)\]"):
            measure(model, matches, data)
    else:
        measure(model, matches, data)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == gradients
    assert all(p.grad is None for p in model.parameters() if p is not model.body.fc.weight)
    assert torch.equal(model.body.fc.weight.grad, torch.ones(24, 32))
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_error_in_the_loss_comes_through() -> None:
    model = mlp()
    matches = list(found(model, rows()).values())
    with pytest.raises(RuntimeError, match="stop here"):
        taylor(model, matches, Calibration([(rows(), rows())], failing))
    assert all(p.requires_grad for p in model.parameters())


def test_a_buffer_that_was_written_is_restored() -> None:
    model = nn.BatchNorm1d(4).train()
    with preserved(model):
        model.running_mean.add_(1)
    assert model.running_mean.eq(0).all() and model.training


def test_an_iterator_can_be_run_twice() -> None:
    def batches() -> Iterator[Tensor]:
        yield from (rows(seed=1), rows(seed=2))

    listed = [rows(seed=1), rows(seed=2)]
    given, expected = (
        fxprune.prune(mlp(), rows(), sparsity=0.5, importance="wanda", compensate=True, calibration=c)
        for c in (batches(), listed)
    )
    for a, b in zip(given.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(a, b)


LOSS = {"importance": "taylor", "loss_fn": F.cross_entropy}
BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no data": (MissingCalibration, r"importance='wanda' needs .* Pass calibration=\[batch", {"importance": "wanda"}),
    "taylor without data": (MissingCalibration, "also loss_fn=", {"importance": "taylor"}),
    "compensate without data": (MissingCalibration, "compensate=True needs", {"compensate": True}),
    "compensate what": (ConfigError, "'compensate' got 'all'", {"compensate": "all", "calibration": [rows()]}),
    "unknown": (ConfigError, "'importance' got 'hessian'; expected one of 'magnitude'", {"importance": "hessian"}),
    "seed": (ConfigError, "'seed' got -1", {"importance": "random", "seed": -1}),
    "loss without data": (ConfigError, "'loss_fn' got", {"loss_fn": F.cross_entropy}),
    "one tensor": (ConfigError, "'calibration' got 'Tensor'; expected an iterable", {"calibration": rows()}),
    "a number": (ConfigError, "'calibration' got 'int'", {"calibration": 3}),
    "loss no callable": (ConfigError, "'loss_fn' got 3", {"calibration": [rows()], "loss_fn": 3}),
    "empty": (CalibrationError, "it holds no batch", {"calibration": [], "importance": "wanda"}),
    "wrong shape": (CalibrationError, "failed on batch 0", {"calibration": [image()], "importance": "wanda"}),
    "no loss": (CalibrationError, "the model's output has no .loss", {"calibration": [rows()], "importance": "taylor"}),
    "no pair": (CalibrationError, "batch 0 is Tensor and not a pair", {"calibration": [rows()], **LOSS}),
    "loss of a batch": (
        CalibrationError,
        r"loss_fn returned \(4, 16\)",
        {"calibration": [(rows(), 0)], "importance": "taylor", "loss_fn": lambda output, _: output},
    ),
    "loss is NaN": (
        CalibrationError,
        "the loss is nan",
        {"calibration": [(rows() * float("inf"), torch.zeros(4).long())], **LOSS},
    ),
    "NaN inputs": (
        CalibrationError,
        "the inputs of '0' are not finite",
        {"calibration": [rows() * float("nan")], "compensate": True},
    ),
    "NaN scores": (ConfigError, "'importance' got \"NaN for '0'\"", {"importance": lambda n, w: w * float("nan")}),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named_and_changes_nothing(name: str) -> None:
    error, message, options = BAD[name]
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        fxprune.prune(model, rows(), sparsity=0.5, inplace=True, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_layers_that_the_data_never_reach_are_named() -> None:
    model, x = OneOrBoth(), integers(4, 8)
    batch = {"x": x, "both": False}
    with pytest.raises(CalibrationError, match=r"called with 'b.weight', which importance='wanda' ranks"):
        fxprune.prune(model, x, sparsity=0.5, importance="wanda", calibration=[batch])
    loss: Callable[..., Tensor] = lambda output, _: output.sum()  # noqa: E731
    with pytest.raises(CalibrationError, match=r"the loss does not depend on 'b.weight'"):
        fxprune.prune(model, x, sparsity=0.5, importance="taylor", calibration=[(batch, None)], loss_fn=loss)


@pytest.mark.parametrize("importance", ["taylor", "wanda"])
def test_compile_and_explain_take_no_data(importance: str) -> None:
    with pytest.raises(MissingCalibration, match=r"Inside torch.compile use 'magnitude'"):
        fxprune.explain(mlp(), rows(), sparsity=0.5, importance=importance)
    compiled = torch.compile(mlp(), backend="hwprune", options={"sparsity": 0.5, "importance": importance})
    with torch.no_grad(), pytest.raises(Exception, match=r"Inside torch.compile use 'magnitude'"):
        compiled(rows())
    assert calibrate(Config(), mlp(), [], None) == Config()


def test_compile_prunes_by_a_score_without_data() -> None:
    options = {"sparsity": 0.5, "importance": "l2", "fallback": "eager", "autotune": "off", "min_speedup": 0.0}
    model, x = mlp(), rows()
    with torch.no_grad():
        given = torch.compile(model, backend="hwprune", options=options)(x)
    expected = fxprune.prune(model, x, sparsity=0.5, importance="l2").model(x)
    assert torch.equal(given, expected)


def test_namespace_outputs_have_a_loss_too() -> None:
    loss = torch.ones((), requires_grad=True)
    assert Calibration([]).loss(SimpleNamespace(loss=loss), None) is loss
