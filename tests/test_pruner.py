"""Pruner: schedules, rounds that nest, masks held whatever optimizer steps, and training that goes on bit for bit."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxprune
from fxprune import CubicSchedule, IterativeSchedule, LinearSchedule, OneShotSchedule, Pruner, backend, hold, hold_steps
from fxprune.errors import ConfigError, NothingToPrune, NotScored, UnknownLayer, WrongOptimizer
from fxprune.plan import lookup
from tests.oracle import FORCED
from tests.pruning_loops import convs, held, image, mlp, rows, train

FINAL = 0.75


OPTIMIZERS: dict[str, Callable[[Iterator[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True, amsgrad=True),
    "adam single": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=False, weight_decay=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True, weight_decay=0.5),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64])
@pytest.mark.parametrize("shared", [1, 8, 32, 64])
def test_what_is_cleared_is_zero_whatever_it_was(dtype: torch.dtype, shared: int) -> None:
    for bad, shape in itertools.product((float("nan"), float("inf"), -float("inf"), 3.0), ((128, 6), (128,), (128, 2, 3))):
        tensor = torch.full(tuple(reversed(shape)), bad, dtype=dtype).permute(*reversed(range(len(shape))))
        few = torch.rand(128 // shared, *shape[1:], generator=torch.Generator().manual_seed(0)) < 0.5
        mask = few.repeat_interleave(shared, 0)
        kept = hold.bits(mask)
        assert kept.shape == (128 // shared, *shape[1:])
        hold_steps.clear([(tensor, kept)])
        assert torch.equal(tensor == 0, ~mask)
    hold_steps.clear([(torch.empty(0, 4), hold.bits(torch.empty(0, 4, dtype=torch.bool)))])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masks_are_held_whatever_optimizer_steps(name: str) -> None:
    model = mlp()
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, None, range(3))  # moments of everything
    pruner = Pruner(model, rows(), sparsity=FINAL, schedule=LinearSchedule(0, 6, 2))
    for step in range(9):
        train(model, optimizer, pruner, range(step, step + 1))
        masks = held(model, pruner)
        for key, mask in masks.items():
            for value in optimizer.state[dict(model.named_parameters())[key]].values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    assert not value[~mask].any(), key
    assert pruner.sparsity["all"] == pytest.approx(FINAL, abs=0.02)


@pytest.mark.parametrize("importance", ["magnitude", "l2", "random", "taylor", lambda name, weight: weight.square() + 1])
@pytest.mark.parametrize(
    "schedule", [OneShotSchedule(3), LinearSchedule(1, 9, 2), CubicSchedule(0, 9, 3), IterativeSchedule(3, 3)]
)
def test_rounds_nest_and_end_at_the_sparsity_asked_for(importance: Any, schedule: Any) -> None:
    model = convs()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    pruner = Pruner(model, image(), sparsity=FINAL, schedule=schedule, importance=importance)
    before: dict[str, Tensor] = {}
    for step in range(1, 12):
        train(model, optimizer, pruner, range(step, step + 1), image)
        masks = held(model, pruner)
        assert all(not (masks[name] & ~mask).any() for name, mask in before.items()), "what is pruned stays pruned"
        assert (set(before) != set(masks) or any((masks[n] != m).any() for n, m in before.items())) <= schedule.is_round(
            step
        )
        before = masks
        if before:
            wanted = schedule.sparsity(min(step, schedule.last), FINAL)
            last = max(s for s in range(1, step + 1) if schedule.is_round(s))
            assert pruner.sparsity["all"] == pytest.approx(schedule.sparsity(last, FINAL), abs=0.06), (step, wanted)
    assert len(before) == 4 and pruner.sparsity["all"] == pytest.approx(FINAL, abs=0.06)


def test_schedules() -> None:
    def curve(schedule: Any) -> dict[int, float]:
        return {s: round(schedule.sparsity(s, 0.8), 4) for s in range(12) if schedule.is_round(s)}

    assert curve(OneShotSchedule()) == {0: 0.8}
    assert curve(LinearSchedule(2, 10, 4)) == {6: 0.4, 10: 0.8}
    assert curve(LinearSchedule(0, 5, 2)) == {2: 0.32, 4: 0.64, 5: 0.8}
    assert curve(CubicSchedule(0, 4, 1)) == {1: 0.4625, 2: 0.7, 3: 0.7875, 4: 0.8}
    assert curve(IterativeSchedule(2, 3, 1)) == {4: round(1 - 0.2**0.5, 4), 7: 0.8}
    for bad in (lambda: LinearSchedule(3, 3, 1), lambda: CubicSchedule(0, 3, 0), lambda: IterativeSchedule(0, 1)):
        with pytest.raises(ConfigError, match="schedule"):
            bad()


@given(begin=st.integers(0, 20), length=st.integers(1, 50), every=st.integers(1, 20), final=st.floats(0.01, 0.99))
def test_schedules_rise_to_the_final_sparsity(begin: int, length: int, every: int, final: float) -> None:
    schedules = (LinearSchedule(begin, begin + length, every), CubicSchedule(begin, begin + length, every))
    for schedule in (*schedules, IterativeSchedule(length, every, begin), OneShotSchedule(begin)):
        rounds = [s for s in range(schedule.last + every + 2) if schedule.is_round(s)]
        curve = [schedule.sparsity(s, final) for s in rounds]
        assert rounds[-1] == schedule.last and curve[-1] == pytest.approx(final)
        assert all(0 < a <= b + 1e-12 for a, b in itertools.pairwise(curve))


def test_one_round_equals_prune() -> None:
    for make, data in ((mlp, rows), (convs, image)):
        model, other = make(), make()
        expected = fxprune.prune(other, data(), sparsity=FINAL)
        pruner = Pruner(model, data(), sparsity=FINAL)
        result = pruner.finalize()
        for (name, a), b in zip(model.named_parameters(), expected.model.parameters(), strict=True):
            assert torch.equal(a, b), name
        assert result.plan.to_dict() == expected.plan.to_dict() and result.sparsity == expected.sparsity
        assert str(result.report) == str(expected.report)


def test_taylor_adds_up_the_window_before_a_round() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pruner = Pruner(model, rows(), sparsity=0.5, schedule=OneShotSchedule(4), importance="taylor", window=2)
    train(model, optimizer, pruner, range(3))
    expected = {}
    for name, parameter in model.named_parameters():
        expected[name] = torch.zeros_like(parameter)
    for step in (2,):
        model.zero_grad()
        (model(rows(step)) - 1).square().mean().backward()
        for name, parameter in model.named_parameters():
            expected[name] += (parameter.grad * parameter.detach()).square()
    for name, score in pruner.state_dict()["scores"].items():
        torch.testing.assert_close(score, expected[name])
    train(model, optimizer, pruner, range(3, 4))
    assert pruner.state_dict()["scores"] == {} and pruner.sparsity["all"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("fused", [False, True])
def test_amp_with_a_scaler(fused: bool) -> None:
    """Scores are of unscaled gradients, and a step that overflows counts for nothing."""
    scores = []
    for scaled in (False, True):
        model = mlp()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=fused)
        pruner = Pruner(model, rows(), sparsity=0.5, schedule=OneShotSchedule(5), importance="taylor")
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        for step in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = (model(rows(step)).float() - 1).square().mean() * (torch.inf if step == 1 and scaled else 1.0)
            if step == 1 and not scaled:
                continue
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            pruner.step()
        scores.append(pruner.state_dict()["scores"])
        train(model, optimizer, pruner, range(3, 8))
        held(model, pruner)
    for name, score in scores[0].items():
        torch.testing.assert_close(scores[1][name], score, rtol=1e-2, atol=1e-7)


def test_gradient_accumulation_and_checkpointing() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model, rows(), sparsity=FINAL, schedule=CubicSchedule(0, 4, 1), importance="taylor")
    for step in range(6):
        optimizer.zero_grad()
        for part in rows(step).split(4):
            checkpoint(model, part, use_reentrant=False).square().mean().backward()
        optimizer.step()
        pruner.step()
        held(model, pruner) if step >= 3 else None
    assert pruner.sparsity["all"] == pytest.approx(FINAL, abs=0.02)


def test_nothing_to_score_is_nothing_missing() -> None:
    model = mlp()
    schedule = OneShotSchedule(1)
    pruner = Pruner(model, rows(), sparsity=None, pattern="4:4", schedule=schedule, importance="taylor")
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), pruner, range(2))
    assert len(pruner.finalize().plan) == 0


def test_no_round_and_no_step_compiles() -> None:
    model = mlp()
    compiles = []

    def count(gm: Any, inputs: Any) -> Any:
        compiles.append(gm)
        return fxprune.hwprune(gm, inputs, options={**FORCED, "grad_sparsity": "2:4"})

    builds: list[Any] = []
    original = backend.rewrite

    def rewrite(*args: Any, **kwargs: Any) -> Any:
        builds.append(1)
        return original(*args, **kwargs)

    torch._dynamo.reset()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    fast = torch.compile(model, backend=count)
    pruner = Pruner(model, rows(), sparsity=FINAL, schedule=CubicSchedule(0, 8, 2))
    twin = copy.deepcopy(model)
    backend.rewrite = rewrite
    try:
        train(fast, optimizer, pruner, range(12))
    finally:
        backend.rewrite = original
    assert len(compiles) == 1 and len(builds) == 1
    held(model, pruner)
    assert not torch.equal(twin[0].weight, model[0].weight)
    torch._dynamo.reset()


def test_training_under_the_backend_is_training_in_eager() -> None:
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        pruner = Pruner(model, rows(), sparsity=FINAL, schedule=LinearSchedule(0, 6, 2))
        call = torch.compile(model, backend=fxprune.hwprune, options=FORCED) if compiled else model
        losses.append(train(call, optimizer, pruner, range(10)))
    torch.testing.assert_close(*map(torch.tensor, losses))


def test_finalize_leaves_a_plain_model_with_a_plan() -> None:
    model = mlp()
    keys = list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner = Pruner(model, rows(), sparsity=FINAL, schedule=CubicSchedule(0, 4, 2))
    assert all(lookup(p) is None for p in model.parameters())
    train(model, optimizer, pruner, range(6))
    result = pruner.finalize()
    assert result.model is model and list(model.state_dict()) == keys and type(model[0].weight) is nn.Parameter
    assert all(lookup(p) is not None for p in model.parameters() if p.dim() == 2)
    assert "0" in str(result.report) and len(result.plan) == 3
    mask = lookup(model[0].weight).mask
    optimizer.zero_grad()
    model(rows()).sum().backward()
    optimizer.step()  # nobody holds any more
    assert model[0].weight[~mask].any()
    handle = result.plan.hold(optimizer)
    assert not model[0].weight[~mask].any()
    handle.remove()


def test_reselection_brings_back_what_was_pruned_with_its_value() -> None:
    model = mlp()
    dense = model[0].weight.detach().clone()
    wanted = {"scores": lambda name, weight: weight.abs()}
    pruner = Pruner(model, rows(), sparsity=0.5, importance=lambda name, weight: wanted["scores"](name, weight), growth=True)
    first = held(model, pruner)["0.weight"]
    wanted["scores"] = lambda name, weight: 1 / (weight.abs() + 1e-3)
    pruner.reselect()
    second = held(model, pruner)["0.weight"]
    assert (second & ~first).any()
    assert torch.equal(model[0].weight, torch.where(second, dense, 0))
    with pytest.raises(ConfigError, match=r"growth.*True"):
        Pruner(mlp(), rows(), sparsity=0.5).reselect()


def test_an_average_of_the_weights_can_be_zeroed() -> None:
    model = mlp()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = Pruner(model, rows(), sparsity=FINAL, schedule=CubicSchedule(0, 4, 2))
    for step in range(6):
        train(model, optimizer, pruner, range(step, step + 1))
        average.update_parameters(model)
    mask = held(model, pruner)["0.weight"]
    assert average.module[0].weight[~mask].any()
    pruner.apply(average.module)
    assert not average.module[0].weight[~mask].any()
    with pytest.raises(ConfigError, match="no parameter"):
        pruner.apply(nn.Linear(2, 2))
    other = mlp()
    other[2] = nn.Linear(3, 3)
    with pytest.raises(ConfigError, match=r"'2\.weight' of shape \(3, 3\)"):
        pruner.apply(other)
    assert bool(other[0].weight.all())


def test_an_optimizer_of_other_parameters_is_noticed() -> None:
    model = mlp()
    stale = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    pruner = Pruner(model, rows(), sparsity=0.5)
    model(rows()).sum().backward()
    stale.step()
    with pytest.raises(WrongOptimizer, match=r"holds none of the 3 parameters to prune \(such as '0\.weight'\)"):
        pruner.step()


def test_an_optimizer_of_ours_may_wait() -> None:
    """Iterations in which only the other side of an adversarial pair steps."""
    model, critic = mlp(), nn.Linear(8, 1)
    pruner = Pruner(model, rows(), sparsity=0.5)
    mine, other = torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(critic.parameters(), lr=0.1)
    for step in range(6):
        critic(model(rows(step))).square().mean().backward()
        other.step()
        if step % 3 == 0:
            mine.step()
        pruner.step()
        held(model, pruner)
    del mine
    other.step()
    with pytest.raises(WrongOptimizer):
        pruner.step()


def test_a_frozen_body_needs_no_optimizer() -> None:
    model, head = mlp().requires_grad_(False), nn.Linear(8, 3)
    pruner = Pruner(model, rows(), sparsity=0.5)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    for step in range(2):
        head(model(rows(step))).sum().backward()
        optimizer.step()
        pruner.step()
        held(model, pruner)


def test_a_model_that_moves_keeps_its_masks() -> None:
    model = mlp()
    pruner = Pruner(model, rows(), sparsity=0.5)
    model.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    train(model, optimizer, pruner, range(2), lambda step: rows(step).double())
    held(model, pruner)


def test_two_optimizers_and_none() -> None:
    model = mlp()
    parts = list(model.parameters())
    optimizers = torch.optim.SGD(parts[:2], lr=0.1, momentum=0.5), torch.optim.Adam(parts[2:], lr=0.1)
    pruner = Pruner(model, rows(), sparsity=0.5)
    model(rows()).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    pruner.step()
    held(model, pruner)
    with torch.no_grad():
        for parameter in parts:
            parameter += 1.0  # an update without an optimizer
    pruner.step()
    held(model, pruner)


def test_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 1)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    pruner = Pruner(model, image(), sparsity=0.5, pattern="channel", schedule=LinearSchedule(0, 4, 2))
    train(model, optimizer, pruner, range(6), image)
    filters = model[0].weight.flatten(1).any(1)
    assert 4 <= int(filters.sum()) <= 12
    assert not model[1].bias[~filters].any() and not model[0].bias[~filters].any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ConfigError, "sparsity"),
        ({"sparsity": 1.0}, ConfigError, "sparsity"),
        ({"target_speedup": 2.0}, ConfigError, "target_speedup"),
        ({"sparsity": 0.5, "importance": "taylor"}, ConfigError, "schedule"),
        ({"sparsity": 0.5, "importance": "tailor"}, ConfigError, "importance"),
        ({"sparsity": 0.5, "window": 0}, ConfigError, "window"),
        ({"pattern": "2:4", "schedule": LinearSchedule(0, 4, 2)}, ConfigError, "schedule"),
        ({"sparsity": {"fc": 0.5}}, UnknownLayer, "fc"),
        ({"sparsity": 0.5, "ignored_layers": ("*",)}, NothingToPrune, "no layer to prune"),
    ],
)
def test_bad_arguments_leave_the_model_alone(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        Pruner(model, rows(), **arguments)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_layers_may_be_named(importance: str) -> None:
    model = mlp()
    wanted = {"linear": 0.5, "0": 0.75, "4": 0.0}
    pruner = Pruner(model, rows(), sparsity=wanted, schedule=LinearSchedule(0, 4, 2), importance=importance)
    train(model, torch.optim.SGD(model.parameters(), lr=0.01), pruner, range(5))
    assert set(held(model, pruner)) == {"0.weight", "2.weight"}
    assert pruner.sparsity["0"] == pytest.approx(0.75, abs=0.02) and pruner.sparsity["linear"] < 0.7


def test_taylor_without_gradients_says_so() -> None:
    model = mlp()
    pruner = Pruner(model, rows(), sparsity=0.5, schedule=OneShotSchedule(1), importance="taylor")
    with pytest.raises(ConfigError, match=r"a gradient for '0\.weight'"):
        pruner.step()


def test_taylor_leaves_what_had_no_gradient_as_it_is() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, rows(), sparsity=0.5, schedule=LinearSchedule(0, 4, 2), importance="taylor", window=2)
    with pytest.warns(NotScored, match=r"no gradient of '0\.weight' in the 2 steps"):
        train(model, optimizer, pruner, range(2))
    others = set(held(model, pruner))
    assert others and "0.weight" not in others and bool(model[0].weight.all())
    model[0].requires_grad_(True)
    model[2].requires_grad_(False)
    was = pruner.state_dict()["masks"]["2.weight"]
    with pytest.warns(NotScored, match="2\\.weight"):
        train(model, optimizer, pruner, range(2, 4))
    masks = held(model, pruner)
    assert {"0.weight", *others} == set(masks) and torch.equal(masks["2.weight"], was)


def test_a_progress_bar_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    for terminal in (False, True):
        model = mlp()
        pruner = Pruner(model, rows(), sparsity=0.5, schedule=LinearSchedule(0, 2, 1))
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr("sys.stderr", stream)
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), pruner, range(3))
        pruner.finalize()
        assert ("pruning" in stream.getvalue()) == terminal


def test_its_plan_can_be_saved_before_and_after_the_end(tmp_path: Path) -> None:
    model = mlp()
    pruner = Pruner(model, rows(), sparsity=FINAL)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), pruner, range(2))
    for name, plan in (("now", pruner.plan), ("end", pruner.finalize().plan)):
        plan.save(tmp_path / f"{name}.json")
        fresh = fxprune.apply_plan(mlp(), fxprune.load_plan(tmp_path / f"{name}.json"))
        fresh.load_state_dict(model.state_dict())
        assert [lookup(p) is not None for p in fresh.parameters()] == [p.dim() == 2 for p in fresh.parameters()]
        for own, other in zip(fresh.parameters(), model.parameters(), strict=True):
            assert own.dim() < 2 or torch.equal(lookup(own).mask, other != 0)
