"""Refitting: exact where it can be, never worse than the mask alone, and the mask stays what it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune.calibration import Calibration
from fxprune.compensate import Gram, Refit, record, refit
from fxprune.config import Config
from fxprune.layer_inputs import Call, Recorder, patches
from fxprune.plan import lookup
from fxprune.prunable import contexts_of, prunable
from tests.oracle import integer_model, integers
from tests.strategies import seeds
from tests.toys import OneOrBoth, image, mobile, rows


def gram_of(inputs: Tensor) -> Gram:
    """inputs: (groups, K, rows)."""
    gram = Gram.zeros(*inputs.shape[:2])
    gram.add(inputs.double())
    return gram


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outputs(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """weight (N, K), x (groups, K, rows) -> (N, rows), float64."""
    y = (weight.double().reshape(len(x), -1, x.shape[1]) @ x.double()).flatten(0, 1)
    return y if bias is None else y + bias.double()[:, None]


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(5, 7), (3, 2, 5)),
    "pointwise": (nn.Conv2d(6, 4, 1, stride=2), (2, 6, 5, 7)),
    "depthwise": (nn.Conv2d(6, 6, 3, padding=1, groups=6), (2, 6, 5, 7)),
    "dilated": (nn.Conv2d(4, 4, (3, 5), stride=(2, 1), padding=(2, 4), dilation=2, groups=4), (1, 4, 9, 8)),
    "same": (nn.Conv2d(3, 8, (2, 3), padding="same"), (2, 3, 5, 4)),
    "grouped": (nn.Conv2d(6, 9, 3, padding=1, groups=3), (2, 6, 4, 5)),
    "one image": (nn.Conv2d(3, 4, 3), (3, 6, 6)),
    "conv1d": (nn.Conv1d(4, 4, 3, padding=2, groups=4), (2, 4, 6)),
    "circular": (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (1, 4, 5, 5)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", LAYERS)
def test_the_weight_times_its_patches_is_the_layer(name: str) -> None:
    """Integers: the recorded inputs are the ones that the layer multiplies, in the order of its outputs."""
    layer, shape = LAYERS[name]
    integer_model(layer)
    calls: list[Call] = []
    x = integers(*shape, seed=4)
    with torch.no_grad(), Recorder({"weight": layer.weight}, calls.append):
        expected = layer(x)
    (call,) = calls
    inputs = torch.cat(list(patches(call)), 2)
    assert inputs.dtype == torch.float64
    given = outputs(layer.weight.flatten(1), inputs, layer.bias)
    if name == "linear":
        expected = expected.reshape(-1, 7).t()
    else:
        expected = (expected[None] if name == "one image" else expected).transpose(0, 1).flatten(1)
    assert torch.equal(given, expected.double())


def test_pieces_are_small_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.layer_inputs._CHUNK", 8 * 9 * 6 * 36)
    call = Call("w", integers(5, 6, 6, 6), kernel=(3, 3), groups=6)
    pieces = list(patches(call))
    assert len(pieces) == 5 and torch.cat(pieces, 2).shape == (6, 9, 5 * 16)
    assert sum(p.shape[2] for p in patches(Call("w", integers(4999, 60)))) == 4999


def test_the_gram_matrix_is_that_of_the_inputs() -> None:
    model, batches = mobile(), [image(seed=1), image(seed=2)]
    matches = prunable(model, contexts_of(model, image(), Config()))
    grams = record(model, matches, Calibration(batches))
    assert set(grams) == {"dw.weight", "pw.weight", "fc.weight"}
    x = torch.cat(batches)
    windows = F.unfold(x, 3, padding=1).reshape(4, 16, 9, 64).permute(1, 2, 0, 3).flatten(2).double()
    assert torch.equal(grams["dw.weight"].matrix, windows @ windows.transpose(1, 2))
    assert torch.equal(grams["dw.weight"].total, windows.sum(2)) and grams["dw.weight"].rows == 4 * 64
    hidden = model.act(model.bn1(model.dw(x))).double()
    rows_ = hidden.transpose(0, 1).flatten(1)
    assert torch.equal(grams["pw.weight"].matrix[0], rows_ @ rows_.t())


def test_a_weight_used_twice_adds_up_and_either_orientation_is_known() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(integers(6, 6, seed=1, low=-1, high=1))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.w), self.w) @ self.w.t()

    model, x = Tied(), integers(5, 6)
    matches = prunable(model, contexts_of(model, x, Config()))
    gram = record(model, matches, Calibration([x]))["w"]
    w = model.w.detach()
    seen = torch.cat([x, x @ w.t(), x @ w.t() @ w.t()]).double()
    assert torch.equal(gram.matrix[0], seen.t() @ seen) and gram.rows == 15


@st.composite
def problems(draw_: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """weight (N, K), mask, inputs (groups, K, rows), bias."""
    groups, features, k = draw_(st.integers(1, 3)), draw_(st.integers(1, 6)), draw_(st.integers(1, 12))
    count, seed = draw_(st.integers(1, 40)), draw_(seeds)
    weight = draw(seed, groups * features, k)
    share = draw_(st.sampled_from((0.0, 0.3, 0.7, 1.0)))
    form = draw_(st.sampled_from(("element", "tile", "columns")))
    mask = draw(seed + 1, *weight.shape).sigmoid() >= share
    if form == "tile":
        mask = mask[:1].expand_as(mask).clone()
    if form == "columns":
        mask[::2] = False
    x = draw(seed + 2, groups, k, count)
    if draw_(st.booleans()):
        x[:, ::2] = draw_(st.sampled_from((0.0, 3.0)))
    if draw_(st.booleans()):
        x = x[:, :, :1].expand_as(x)
    bias = draw(seed + 3, len(weight)) if draw_(st.booleans()) else None
    return weight, mask, x, bias


@given(problems())
def test_the_error_never_rises_and_zeros_stay(problem: tuple[Tensor, Tensor, Tensor, Tensor | None]) -> None:
    weight, mask, x, bias = problem
    result = refit(weight, mask, gram_of(x), bias)
    assert not result.weight[~mask].any() and result.weight.dtype == weight.dtype
    assert (result.bias is None) == (bias is None) and result.after <= result.before
    y = outputs(weight, x, bias)
    scale = outputs(weight, x, None).norm()
    for new, shift, claimed in ((weight * mask, bias, result.before), (result.weight, result.bias, result.after)):
        measured = ((outputs(new, x, shift) - y).norm() / scale).item() if scale else 0.0
        assert measured == pytest.approx(claimed, rel=1e-3, abs=1e-6)


@given(st.integers(1, 4), st.integers(5, 10), seeds)
def test_it_is_exact_when_the_inputs_span_few_directions(rank: int, kept: int, seed: int) -> None:
    k = 2 * kept
    x = draw(seed, 1, k, rank) @ draw(seed + 1, 1, rank, 50)
    weight = draw(seed + 2, 6, k)
    mask = torch.zeros(6, k, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(k, generator=torch.Generator().manual_seed(seed))[:kept]] = True
    result = refit(weight, mask, gram_of(x), damping=0.0)
    assert result.before > 0.05 and result.after < 1e-3


def test_without_damping_it_is_the_least_squares_solution() -> None:
    weight, x = draw(0, 4, 10), draw(1, 1, 10, 60)
    mask = draw(2, 4, 10) > 0
    result = refit(weight, mask, gram_of(x), damping=0.0)
    for row in range(4):
        inputs = x[0, mask[row]].t().double()
        expected = torch.linalg.lstsq(inputs, (weight[row].double() @ x[0].double())[:, None]).solution[:, 0]
        torch.testing.assert_close(result.weight[row, mask[row]].double(), expected, rtol=1e-4, atol=1e-5)


def test_the_bias_takes_the_mean_of_what_was_lost() -> None:
    """Output features that keep nothing become their mean; a constant input is absorbed altogether."""
    weight, bias, x = draw(0, 3, 6), draw(1, 3), draw(2, 1, 6, 40) + 2
    mask = torch.tensor([[False] * 6, [True] * 6, [True, False] * 3])
    result = refit(weight, mask, gram_of(x), bias, damping=0.0)
    y = outputs(weight, x, bias)
    torch.testing.assert_close(result.bias[0].double(), y[0].mean(), rtol=1e-5, atol=1e-5)
    assert torch.equal(result.weight[1], weight[1]) and result.bias[1] == bias[1]
    centred = outputs(result.weight, x, result.bias) - y
    torch.testing.assert_close(centred.mean(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-5)
    constant = torch.ones(1, 6, 40)
    assert refit(weight, mask, gram_of(constant), bias).after < 1e-6


def test_inputs_that_are_always_zero_leave_the_weight_alone() -> None:
    weight, mask = draw(0, 4, 6), draw(1, 4, 6) > 0
    result = refit(weight, mask, gram_of(torch.zeros(1, 6, 9)), draw(2, 4))
    assert torch.equal(result.weight, weight * mask) and (result.before, result.after) == (0.0, 0.0)


class Small(nn.Module):
    """Depthwise, 1x1 with and without bias, linear; correlated inputs make refitting worth while."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.dw = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.pw = nn.Conv2d(32, 64, 1, bias=False)
        self.bn = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.pw(F.relu(self.dw(x)))))
        return self.head(F.relu(self.fc(y.mean((2, 3)))))


def batches(count: int = 3, seed: int = 5) -> list[Tensor]:
    mix = draw(seed, 6, 32)
    smooth = [F.avg_pool2d(draw(seed + 1 + i, 16, 6, 8, 8), 3, 1, 1) for i in range(count)]
    return [torch.einsum("bkhw,kc->bchw", s, mix) for s in smooth]


def error(model: nn.Module, reference: nn.Module, data: list[Tensor]) -> float:
    with torch.no_grad():
        pairs = [(model.eval()(x), reference.eval()(x)) for x in data]
    total = sum((a - b).square().sum().item() for a, b in pairs)
    return (total / sum(b.square().sum().item() for _, b in pairs)) ** 0.5


@pytest.mark.parametrize("mode", [True, "sequential"])
@pytest.mark.parametrize("granularity", [None, 1])
def test_a_refitted_model_is_closer_under_the_same_masks(mode: Any, granularity: int | None) -> None:
    model, data = Small(), batches()
    before = copy.deepcopy(model.state_dict())
    options: dict[str, Any] = {"sparsity": 0.5, "granularity": granularity, "calibration": data}
    masked = fxprune.prune(model, data[0], **options)
    fitted = fxprune.prune(model, data[0], compensate=mode, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    for a, b in zip(masked.model.parameters(), fitted.model.parameters(), strict=True):
        if lookup(a) is not None:
            assert torch.equal(lookup(a).mask, lookup(b).mask) and not b[~lookup(b).mask].any()
            assert not torch.equal(a, b)
    assert masked.plan.to_json() == fitted.plan.to_json()
    assert error(fitted.model, model, data) < 0.5 * error(masked.model, model, data)
    assert error(fitted.model, model, batches(seed=5)[-1:]) < 0.5
    rows_ = fitted.report.to_dict()["rows"]
    assert {row["layer"] for row in rows_} == {"dw", "pw", "fc", "head"}
    for row in rows_:
        assert float(row["refitted"].rstrip("%")) < float(row["output error"].rstrip("%")) < 100
    assert torch.equal(fitted.model.bn.running_mean, model.bn.running_mean)


def test_the_last_layer_alone_is_fitted_as_a_regression() -> None:
    """One pruned layer: the reported errors are those of the model's outputs, before and after."""
    model, data = Small(), batches()
    result = fxprune.prune(model, data[0], sparsity={"head": 0.5}, calibration=data, compensate=True)
    row, *left = result.report.to_dict()["rows"]
    assert row["layer"] == "head" and [r["note"] for r in left] == ["left: not asked for"] * 3
    with torch.no_grad():
        y, given = (torch.cat([m.eval()(x) for x in data]) for m in (model, result.model))
    scale = (y - model.head.bias).norm()
    assert float(row["refitted"].rstrip("%")) / 100 == pytest.approx(((given - y).norm() / scale).item(), abs=1e-4)


def test_in_place_and_copies_agree() -> None:
    data = batches(1)
    for mode in (True, "sequential"):
        model = Small()
        copied = fxprune.prune(model, data[0], sparsity=0.5, calibration=data, compensate=mode).model
        assert fxprune.prune(model, data[0], sparsity=0.5, calibration=data, compensate=mode, inplace=True).model is model
        for a, b in zip(model.parameters(), copied.parameters(), strict=True):
            assert torch.equal(a, b)


def test_few_layers_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(1)
    whole = fxprune.prune(Small(), data[0], sparsity=0.5, calibration=data, compensate=True).model
    monkeypatch.setattr("fxprune.compensate._BUDGET", 1)
    parts = fxprune.prune(Small(), data[0], sparsity=0.5, calibration=data, compensate=True).model
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_shared_bias_is_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
            self.b.bias = self.a.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    model = Shared()
    result = fxprune.prune(model, rows(), sparsity=0.5, calibration=[draw(0, 40, 32)], compensate=True)
    assert torch.equal(result.model.a.bias, model.a.bias) and result.model.b.bias is result.model.a.bias


def test_a_layer_that_the_data_never_reach_says_so() -> None:
    batch = {"x": integers(6, 8), "both": False}
    result = fxprune.prune(OneOrBoth(), integers(6, 8), sparsity=0.5, calibration=[batch], compensate=True)
    table = {row["layer"]: row for row in result.report.to_dict()["rows"]}
    assert (table["b"]["output error"], table["b"]["refitted"]) == ("-", "not recorded") and "%" in table["a"]["refitted"]


def test_the_refitted_model_compiles_to_itself() -> None:
    data = batches(1)
    model = fxprune.prune(Small().eval(), data[0], sparsity=0.5, calibration=data, compensate=True).model
    options = {"fallback": "eager", "autotune": "off", "min_speedup": 0.0}
    with torch.no_grad():
        given, expected = torch.compile(model, backend="hwprune", options=options)(data[0]), model(data[0])
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)


def test_a_refit_is_plain_data() -> None:
    weight = draw(0, 2, 3)
    result = refit(weight, torch.ones(2, 3, dtype=torch.bool), gram_of(draw(1, 1, 3, 5)))
    assert isinstance(result, Refit) and torch.equal(result.weight, weight) and result.before == result.after == 0.0


def test_sequential_fits_the_second_layer_to_the_dense_output() -> None:
    """Two linear layers: the second sees the pruned first, and solves the regression onto what the dense two give."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Linear(16, 8, bias=False)), draw(0, 60, 12)
    result = fxprune.prune(model, x, sparsity=0.5, granularity=8, columns=False, calibration=[x], compensate="sequential")
    first, second = result.model
    with torch.no_grad():
        inputs, wanted = first(x), model(x)
    gram = Gram.zeros(1, 16, own=True)
    gram.add(inputs.t()[None].double(), model[0](x).detach().t()[None].double())
    expected = refit(model[1].weight, lookup(second.weight).mask, gram)
    torch.testing.assert_close(second.weight.detach(), expected.weight)
    exact = refit(model[1].weight, lookup(second.weight).mask, gram, damping=0.0)
    for row in range(8):
        kept = lookup(second.weight).mask[row]
        solution = torch.linalg.lstsq(inputs[:, kept].double(), wanted[:, row, None].double()).solution[:, 0]
        torch.testing.assert_close(exact.weight[row, kept].double(), solution, rtol=1e-3, atol=1e-4)
    row_ = result.report.to_dict()["rows"][1]
    error_ = ((result.model(x) - wanted).norm() / wanted.norm()).item()
    assert float(row_["refitted"].rstrip("%")) / 100 == pytest.approx(error_, abs=1e-4)
