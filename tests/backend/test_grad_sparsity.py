"""``grad_sparsity`` from option to step: no recompile, schedules, seeds, caches, loss scaling, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fxprune.lowering import measure_gradient
from fxprune.lowering.measure_gradient import MeasureGradient
from torch import Tensor, nn

import fxprune
from fxprune import backend
from fxprune import gradients as gradients_module
from fxprune.decisions import LAST_REPORTS
from fxprune.errors import NoGradientPruned
from fxprune.gradients import GradientTimes, gradient_clock, ratio_at
from fxprune.ops import nm_mm
from tests.oracle import FORCED, integer_model, integers
from tests.sdgp import gradients, watched


@pytest.fixture(autouse=True)
def clock() -> Iterator[None]:
    torch._dynamo.reset()
    gradient_clock.load_state_dict({"step": 0, "call": 0})
    yield
    torch._dynamo.reset()


def small() -> nn.Module:
    layers = (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 25, 8))
    return integer_model(nn.Sequential(*layers)).train()


def image(batch: int = 2) -> Tensor:
    return integers(batch, 8, 5, 5, seed=7)


def compiled(model: nn.Module, ratio: Any = "2:4", **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=fxprune.hwprune, options={**FORCED, "grad_sparsity": ratio, **options})


def test_inductor_gives_what_eager_gives() -> None:
    model, x = small(), image()
    expected = gradients(model, compiled(model), x)
    torch._dynamo.reset()
    with watched() as seen:
        given = gradients(model, compiled(model, fallback="inductor"), x)
    assert seen.pruned == [2]
    for name, right in expected.items():
        if right is not None:
            assert torch.equal(given[name], right), name


def test_stock_inductor_afterwards_is_dense() -> None:
    model, x = small(), image()
    dense = gradients(model, model, x)
    pruned = gradients(model, compiled(model, fallback="inductor"), x)
    torch._dynamo.reset()
    stock = gradients(model, torch.compile(model), x)
    assert torch.equal(stock["0.weight"], dense["0.weight"]) and not torch.equal(pruned["0.weight"], dense["0.weight"])


def test_a_second_compile_with_another_ratio_is_not_the_first_from_a_cache() -> None:
    model, x = small(), image()
    found = {}
    for ratio in ("2:4", "1:4", "2:4"):
        torch._dynamo.reset()
        now = gradients(model, compiled(model, ratio, fallback="inductor"), x)["0.weight"]
        assert torch.equal(found.setdefault(ratio, now), now)
    assert not torch.equal(found["2:4"], found["1:4"])


@pytest.mark.parametrize("function", ["random", "mvue"])
def test_every_step_draws_anew_and_none_compiles(function: str) -> None:
    model, x = small(), image()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    call = compiled(model, grad_pruning=function)
    with watched() as seen:
        steps = []
        for _ in range(4):
            steps.append(gradients(model, call, x)["0.weight"])
            optimizer.step()
    assert seen.pruned == [2]
    assert not any(torch.equal(a, b) for i, a in enumerate(steps) for b in steps[:i])
    assert gradient_clock.step == 4


def test_accumulated_calls_of_one_step_draw_different_numbers() -> None:
    model, x = small(), image()
    call = compiled(model, grad_pruning="random")
    assert not torch.equal(gradients(model, call, x)["0.weight"], gradients(model, call, x)["0.weight"])


def test_a_backward_after_the_next_forward_uses_its_own_numbers() -> None:
    model, x = small(), image()
    call = compiled(model, grad_pruning="random")
    expected = [gradients(model, call, x, upstream=torch.ones(2, 8))["0.weight"] for _ in range(2)]
    gradient_clock.load_state_dict({"step": 0, "call": 0})
    first, second = call(x), call(x)
    for output, right in ((second, expected[1]), (first, expected[0])):
        model.zero_grad()
        output.backward(torch.ones(2, 8))
        assert torch.equal(model[0].weight.grad, right)


def test_the_state_of_the_clock_repeats_a_step() -> None:
    model, x = small(), image()
    call = compiled(model, grad_pruning="random", seed=5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradients(model, call, x)
    optimizer.step()
    state = gradient_clock.state_dict()
    expected = gradients(model, call, x)["0.weight"]
    torch._dynamo.reset()
    gradient_clock.load_state_dict(state)
    assert torch.equal(gradients(model, compiled(model, grad_pruning="random", seed=5), x)["0.weight"], expected)
    gradient_clock.load_state_dict(state)
    torch._dynamo.reset()
    assert not torch.equal(gradients(model, compiled(model, grad_pruning="random", seed=6), x)["0.weight"], expected)


def test_a_schedule_compiles_each_ratio_once() -> None:
    schedule = {0: "off", 2: "2:4", 4: "1:4", 5: "4:4"}
    assert [str(ratio_at(schedule, step)) for step in range(6)] == ["None", "None", "2:4", "2:4", "1:4", "None"]
    assert ratio_at({3: "2:4"}, 2) is None
    model, x = small(), image()
    reference = {ratio: gradients(model, compiled(model, ratio), x)["0.weight"] for ratio in ("2:4", "1:4")}
    reference["None"] = gradients(model, model, x)["0.weight"]
    torch._dynamo.reset()
    gradient_clock.load_state_dict({"step": 0, "call": 0})
    call, optimizer = compiled(model, schedule), torch.optim.SGD(model.parameters(), lr=0.0)
    with watched() as seen:
        for step in range(8):
            assert torch.equal(gradients(model, call, x)["0.weight"], reference[str(ratio_at(schedule, step))]), step
            optimizer.step()
    assert seen.pruned == [2, 2]


def test_a_symbolic_batch() -> None:
    model = small()
    call = torch.compile(
        model, backend=fxprune.hwprune, dynamic=True, options={**FORCED, "grad_sparsity": "2:4", "grad_pruning": "magnitude"}
    )
    with watched() as seen:
        found = [gradients(model, call, image(batch)) for batch in (3, 5)]
    assert seen.pruned == [2]
    for batch, given in zip((3, 5), found, strict=True):
        torch._dynamo.reset()
        expected = gradients(model, compiled(model), image(batch))
        assert torch.equal(given["0.weight"], expected["0.weight"])


def test_complex_layers_stay_dense() -> None:
    model = nn.Linear(4, 8, dtype=torch.complex64).train()
    x = torch.complex(integers(3, 4), integers(3, 4, seed=1)).requires_grad_()

    def run(call: Callable[..., Any]) -> Tensor:
        (grad,) = torch.autograd.grad(call(x).abs().square().sum(), x)
        return grad

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*complex.*")
        with pytest.warns(NoGradientPruned, match="complex64"):
            given = run(compiled(model))
    torch.testing.assert_close(given, run(model))


@pytest.mark.parametrize("function", ["magnitude", "rescaled_magnitude", "mvue"])
def test_a_scaled_loss_gives_scaled_gradients(function: str) -> None:
    model, x = small(), image()
    call = compiled(model, grad_pruning=function)
    plain = gradients(model, call, x, upstream=torch.ones(2, 8))
    gradient_clock.load_state_dict({"step": 0, "call": 0})
    scaled = gradients(model, call, x, upstream=torch.full((2, 8), 1024.0))
    for name in ("0.weight", "2.weight", "5.weight"):
        assert torch.equal(scaled[name], plain[name] * 1024), name


@pytest.mark.parametrize("function", ["random", "magnitude", "rescaled_magnitude", "mvue"])
def test_grad_scaler_sees_an_overflow(function: str) -> None:
    model, x = small(), image()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = copy.deepcopy(model.state_dict())
    scaler.scale(compiled(model, grad_pruning=function)(x).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_checkpointed_block_keeps_its_own_gradient() -> None:
    """What is recomputed lies in a graph of its own, which stays dense; the layers around it are pruned."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.utils.checkpoint.checkpoint(lambda t: F.relu(self.b(t)), F.relu(self.a(x)), use_reentrant=False)
            return self.c(y)

    model = integer_model(Checkpointed()).train()
    x = integers(4, 8).requires_grad_()
    with watched() as seen:
        given = gradients(model, compiled(model), x)
    assert sum(seen.pruned) == 2
    assert torch.equal(given["c.weight"], gradients(model, model, x)["c.weight"])


def test_auto_prunes_only_what_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"0": GradientTimes(3.0, 1.0), "2": GradientTimes(1.0, 3.0, 2.0), "5": GradientTimes(1.01, 1.0)}
    names = iter([*times, "0"])  # what won is timed again
    monkeypatch.setattr(MeasureGradient, "__call__", lambda self, *layer: times[next(names)])
    model, x = small(), image().requires_grad_()
    with watched() as seen:
        gradients(model, compiled(model, "auto:1:4", min_speedup=1.02), x)
    assert seen.pruned == [1]
    report = fxprune.gradient_report()
    rows = {row["layer"]: row for row in report.to_dict()["rows"]}
    assert [rows[n]["data gradient reads"] for n in times] == ["pruned", "dense", "dense"]
    assert [rows[n]["skipping zeros us"] for n in times] == ["-", "2.0", "-"]
    assert rows["0"]["gain"] == "3.00" and rows["2"]["reason"] == "pruned it is 0.50 times as fast"
    assert "1.66 times as fast as dense" in str(report)  # (3 + 1 + 1.01) / (1 + 1 + 1.01)


def test_one_disturbed_measurement_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense product of "0" was starved the first time; of "2" the lesser gain is reported."""
    first = {"0": GradientTimes(30.0, 2.0), "2": GradientTimes(4.0, 1.0), "5": GradientTimes(1.0, 2.0)}
    times = iter([*first.values(), GradientTimes(1.0, 2.0), GradientTimes(3.0, 1.0)])
    monkeypatch.setattr(MeasureGradient, "__call__", lambda self, *layer: next(times))
    model, x = small(), image().requires_grad_()
    with watched() as seen:
        gradients(model, compiled(model, "auto:1:4", min_speedup=1.02), x)
    assert seen.pruned == [1] and next(times, None) is None
    rows = {row["layer"]: row for row in fxprune.gradient_report().to_dict()["rows"]}
    assert rows["0"]["reason"] == "pruned it is 0.50 times as fast" and rows["2"]["gain"] == "3.00"


def test_auto_without_a_gain_is_dense() -> None:
    """Also without a clock, which autotune="off" is."""
    model, x = small(), image()
    with warnings.catch_warnings(), watched() as seen:
        warnings.simplefilter("error")
        given = gradients(model, compiled(model, "auto"), x)
    assert not seen.pruned
    assert torch.equal(given["0.weight"], gradients(model, model, x)["0.weight"])
    assert "its time was not measured" in str(fxprune.gradient_report())


def test_auto_without_a_winner_compiles_what_stock_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left of the option: stock gets the user's graph and no more inputs, so a step costs what it costs there."""
    monkeypatch.setattr(MeasureGradient, "__call__", lambda self, *layer: GradientTimes(1.0, 2.0, 1.5))
    asked: list[tuple[str, int]] = []
    given: list[tuple[str, int]] = []
    stock = backend.codegen.stock

    def watch(gm: Any, inputs: Any, config: Any) -> Any:
        given.append((str(gm.graph), len(inputs)))
        return stock(gm, inputs, config)

    def called(gm: Any, inputs: Any) -> Any:
        asked.append((str(gm.graph), len(inputs)))
        return fxprune.hwprune(gm, inputs, options={"grad_sparsity": "auto:2:4"})

    monkeypatch.setattr(backend.codegen, "stock", watch)
    model = small()
    gradients(model, torch.compile(model, backend=called), image().requires_grad_())
    assert given == asked and len(asked) == 1
    reasons = [row["reason"] for row in fxprune.gradient_report().to_dict()["rows"]]
    assert reasons == ["pruned it is 0.67 times as fast"] * 3


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_fixed_ratio_reports_its_cost(dynamic: bool | None) -> None:
    options = {**FORCED, "autotune": "fast", "grad_sparsity": "2:4"}
    model, x = small(), image().requires_grad_()
    call = torch.compile(model, backend=fxprune.hwprune, dynamic=dynamic, options=options)
    with watched() as seen:
        gradients(model, call, x)
    assert seen.pruned == [3]
    rows = fxprune.gradient_report().to_dict()["rows"]
    assert [row["layer"] for row in rows] == ["0", "2", "5"]
    assert all(float(row["pruned us"]) > 0 and float(row["dense us"]) > 0 for row in rows)
    assert all(float(row["skipping zeros us"]) > 0 for row in rows)
    choices = [layer.skips for layer in LAST_REPORTS[-1].gradients]
    assert [row["data gradient reads"] == "pruned, skipping zeros" for row in rows] == choices


@pytest.mark.parametrize("function", ["magnitude", "group_rescaled_magnitude"])
def test_a_gpu_times_16_bit_products_of_its_own(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed, and run when it is the fastest; as on a GPU, whose operator takes these types."""

    def fastest(runs: list[Callable[[], Tensor]], rounds: int) -> tuple[list[float], bool]:
        pruned, _, sparse = (run() for run in runs)
        torch.testing.assert_close(pruned, sparse)
        return [2.0, 3.0, 1.0], True

    monkeypatch.setattr(measure_gradient, "interleave", fastest)
    monkeypatch.setattr(nm_mm, "runs", lambda x, weight, n, m: x.dtype == torch.bfloat16)
    model, x = integer_model(nn.Linear(8, 12)).train().bfloat16(), integers(5, 8).bfloat16().requires_grad_()
    with watched() as seen:
        gradients(model, compiled(model, "2:4", autotune="fast", grad_pruning=function), x)
    assert seen.operators[0]["fxprune.nm_mm.default"] == 1
    assert seen.operators[0]["fxprune.nm_prune.default"] == (function != "magnitude")


@pytest.mark.parametrize("call", [F.linear, torch.matmul, F.conv1d, F.conv2d])
def test_what_is_timed_are_products_of_the_same_value(call: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """dense, pruned and skipping differ in time alone: with every value kept all three are the same integers."""

    def keep_all(runs: list[Callable[[], Tensor]], rounds: int) -> tuple[list[float], bool]:
        assert len(runs) == 3 and rounds == 5
        pruned, dense, skipping = (run() for run in runs)
        torch.testing.assert_close(pruned, skipping)
        assert pruned.shape == dense.shape and not torch.allclose(pruned, dense)
        return [2.0, 3.0, 1.0], True

    monkeypatch.setattr(measure_gradient, "interleave", keep_all)
    window = (1,) * (0 if call in (F.linear, torch.matmul) else 1 if call is F.conv1d else 2)
    weight = nn.Parameter(integers(8, 12) if call is torch.matmul else integers(12, 8, *window))
    x = integers(2, 8, *[5] * len(window)).requires_grad_() if window else integers(2, 5, 8).requires_grad_()

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return call(x, self.weight)

    model = Layer().train()
    with watched() as seen:
        gradients(model, compiled(model, "auto:2:4", autotune="fast"), x)
    assert seen.operators[0]["fxprune.skip_zeros_mm.default"] == 1
    assert "1.0" in str(fxprune.gradient_report()) and "3.00 times as fast as dense" in str(fxprune.gradient_report())


def test_the_report_names_the_whole_steps_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 10 ms with two calls, each saving 2 ms: (10 + 2 * 2) / 10."""
    monkeypatch.setattr(MeasureGradient, "__call__", lambda self, *layer: GradientTimes(3000.0, 1000.0))
    ticks = iter(range(100))
    monkeypatch.setattr(gradients_module, "perf_counter", lambda: next(ticks) * 0.01)
    model, x = integer_model(nn.Linear(8, 12)).train(), integers(4, 8).requires_grad_()
    optimizer, call = torch.optim.SGD(model.parameters(), lr=0.0), compiled(model, "auto:2:4")
    gradients(model, call, x)
    assert "whole step" not in str(fxprune.gradient_report())
    for _ in range(5):
        for _ in range(2):
            gradients(model, call, x)
        optimizer.step()
    assert "10.0 ms, by these times 1.40 times as fast as with dense gradients" in str(fxprune.gradient_report())
