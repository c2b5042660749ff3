"""Zeros held over optimizer steps: the cheap way, by the gradient, is taken where it is safe, and gives the same bits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import hold_steps
from fxprune.hold import bits
from fxprune.ops.clear_pruned import reference
from fxprune.plan import lookup

OPTIMIZERS: dict[str, tuple[Callable[[Any], torch.optim.Optimizer], bool]] = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1), True),
    "sgd maximize": (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.5, dampening=0.1, maximize=True), True),
    "sgd foreach": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True), True),
    "sgd foreach, nesterov": (  # which writes to gradients
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
        False,
    ),
    "adam fused": (lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=0.1, amsgrad=True, fused=True), True),
    "adamw fused": (lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.5, fused=True), True),
    "adagrad fused": (lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1, fused=True), True),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=1e-2), False),  # a square root of zeros is slow there
    "adam without eps": (lambda p: torch.optim.Adam(p, lr=1e-2, eps=0.0, fused=True), False),
    "adamax": (lambda p: torch.optim.Adamax(p, lr=1e-2), False),
    "rprop": (lambda p: torch.optim.Rprop(p, lr=1e-2), False),
    "a class of one's own": (lambda p: Noisy(p, lr=1e-2), False),
}


class Noisy(torch.optim.SGD):
    """Stochastic gradient descent that moves every weight, whatever its gradient."""

    def step(self, closure: Any = None) -> None:
        super().step()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter += 0.125


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))


class Training:
    """A network with its optimizer and its pruner, and how often gradients were zeroed instead of weights."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        optimizer: Any = OPTIMIZERS["sgd"][0],
        growth: bool = False,
        schedule: Any = None,
    ) -> None:
        self.model = net()
        self.optimizer = optimizer(self.model.parameters())
        self.pruner = fxprune.Pruner(self.model, torch.zeros(2, 24), sparsity=0.75, growth=growth, schedule=schedule)
        self.masks = self.pruner.state_dict()["masks"]
        self.cheap, self.costly = 0, 0
        original = hold_steps.zero

        def zero(optimizer: Any, kept: Any) -> None:
            self.costly += len(kept)
            self.cheap += 3 - len(kept)
            original(optimizer, kept)

        monkeypatch.setattr(hold_steps, "zero", zero)

    def backward(self, step: int) -> Tensor:
        self.optimizer.zero_grad()
        x = torch.randn(16, 24, generator=torch.Generator().manual_seed(step))
        loss = (self.model(x) - 1).square().mean()
        loss.backward()
        return loss

    def step(self, step: int) -> None:
        self.backward(step)
        self.optimizer.step()
        self.pruner.step()

    def held(self) -> bool:
        """Return whether weights and what the optimizer keeps of their shape are zero where they are pruned."""
        for name, mask in self.masks.items():
            parameter = self.model.get_parameter(name)
            for value in hold_steps.written(self.optimizer, parameter):
                if value[~mask].any():
                    return False
            assert (parameter[mask] != 0).float().mean() > 0.9
        return len(self.masks) == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_step_leaves_zeros_and_the_same_bits_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, cheap = OPTIMIZERS[name]
    training = Training(monkeypatch, make)
    other = net()
    optimizer = make(other.parameters())
    for step in range(40):
        training.step(step)
        assert training.held(), step
    for step in range(40):  # the oracle: weights and moments zeroed after each step, with a mask and a product
        for key, mask in training.masks.items():
            other.get_parameter(key).data.mul_(mask)
        optimizer.zero_grad()
        x = torch.randn(16, 24, generator=torch.Generator().manual_seed(step))
        (other(x) - 1).square().mean().backward()
        optimizer.step()
        for key, mask in training.masks.items():
            for value in hold_steps.written(optimizer, other.get_parameter(key)):
                value.data.copy_(torch.where(mask, value, 0))
    for a, b in zip(training.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=name == "adam without eps")
    # all but the first step, the one that makes the state, and one of each layer in 32
    assert training.cheap >= 3 * 40 - 2 * 3 - 2 * 3 if cheap else training.cheap == 0


def test_the_step_after_a_round_is_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch, OPTIMIZERS["adamw fused"][0], schedule=fxprune.CubicSchedule(4, 12, 4))
    for step in range(16):
        training.step(step)
        training.masks = training.pruner.state_dict()["masks"]
        if step == 3:
            training.cheap = training.costly = 0
    assert training.held()
    assert training.costly <= 3 and training.cheap >= 3 * 12 - 3  # one of each layer in 32


def in_place(t: Training) -> None:
    with torch.no_grad():
        t.model[0].weight += 1.0


def loaded(t: Training) -> None:
    state = t.optimizer.state_dict()
    for entry in state["state"].values():
        entry["momentum_buffer"] = torch.ones_like(entry["momentum_buffer"])
    t.optimizer.load_state_dict(copy.deepcopy(state))


def replaced_state(t: Training) -> None:
    t.optimizer.state[t.model[0].weight]["momentum_buffer"] = torch.ones(64, 24)


@pytest.mark.parametrize("write", [in_place, loaded, replaced_state])
def test_what_others_write_between_steps_is_undone_by_the_next(write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch)
    for step in range(4):
        training.step(step)
    write(training)
    assert not training.held()
    training.step(4)
    assert training.held()


def test_what_others_write_after_the_optimizer_is_undone_by_the_pruner(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch)
    for step in range(4):
        training.backward(step)
        training.optimizer.step()
        in_place(training)
        training.pruner.step()
        assert training.held(), step


def test_what_autograd_does_not_see_is_undone_within_32_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch)
    for step in range(4):
        training.step(step)
    for name in training.masks:
        training.model.get_parameter(name).data.add_(1.0)
    for step in range(4, 36):
        training.step(step)
    assert training.held()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning")
@pytest.mark.parametrize("late", ["hook", "closure", "closure by name", "no gradient", "second order"])
def test_gradients_that_change_or_are_missing(late: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook of the user's that runs after ours, a closure that makes new gradients, and none at all."""
    training = Training(monkeypatch)

    def noise(optimizer: Any, args: Any, kwargs: Any) -> None:
        for parameter in training.model.parameters():
            parameter.grad += 0.5

    if late == "hook":
        training.optimizer.register_step_pre_hook(noise)
    for step in range(6):
        loss = training.backward(step)
        if late == "no gradient" and step > 3:
            training.optimizer.zero_grad()
        if late == "second order":
            training.optimizer.zero_grad()
            (training.model(torch.ones(2, 24)).square().sum()).backward(create_graph=True)
        if late == "closure":
            training.optimizer.step(lambda step=step: training.backward(step))
        elif late == "closure by name":
            training.optimizer.step(closure=lambda step=step: training.backward(step))
        else:
            training.optimizer.step()
        training.pruner.step()
        assert training.held(), step
    assert loss.isfinite() and (training.cheap > 0) == (late == "no gradient")


def test_gradients_are_left_alone_where_they_may_say_what_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    for growth in (False, True):
        training = Training(monkeypatch, growth=growth)
        for step in range(4):
            training.step(step)
        mask = training.masks["0.weight"]
        assert bool(training.model[0].weight.grad[~mask].any()) == growth and training.held()


def test_a_compiled_optimizer_step(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch)
    step = torch.compile(training.optimizer.step, backend="eager")
    for number in range(4):
        training.backward(number)
        step()
        training.pruner.step()
        assert training.held(), number
    torch._dynamo.reset()


def test_a_plan_makes_its_bits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    original = fxprune.plan.bits
    monkeypatch.setattr(fxprune.plan, "bits", lambda mask: (made.append(1), original(mask))[1])
    result = fxprune.prune(net(), torch.zeros(2, 24), sparsity=0.75)
    optimizer = torch.optim.AdamW(result.model.parameters(), lr=1e-2)
    result.plan.hold(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        result.model(torch.randn(16, 24, generator=torch.Generator().manual_seed(step))).sum().backward()
        optimizer.step()
        for parameter in result.model.parameters():
            if (pruned := lookup(parameter)) is not None:
                assert not any(v[~pruned.mask].any() for v in hold_steps.written(optimizer, parameter))
    assert len(made) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kept", [torch.int8, torch.int32])
@pytest.mark.parametrize("shape", [(64, 37), (128, 16, 3, 3), (3, 5), (64,), (640, 1024)])
def test_the_operator_equals_its_reference(dtype: torch.dtype, kept: torch.dtype, shape: tuple[int, ...], isa: str) -> None:
    gen = torch.Generator().manual_seed(0)
    shared = 32 if shape[0] % 32 == 0 else 1
    values = [torch.randn(shape, generator=gen).to(dtype), torch.full(shape, float("nan"), dtype=dtype)]
    mask = torch.rand(shape[0] // shared, *shape[1:], generator=gen) < 0.5
    expected = [torch.where(mask.repeat_interleave(shared, 0), v, 0) for v in values]
    copies = [v.clone() for v in values]
    torch.ops.fxprune.clear_pruned(values, [mask.to(kept).neg()] * 2)
    reference(copies, [mask.to(kept).neg()] * 2)
    for value, copied, right in zip(values, copies, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(copied, right, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("values", "kept", "message"),
    [
        ([torch.zeros(4, 4)], [], "as many, got 1 and 0"),
        ([torch.zeros(4, 4, dtype=torch.int32)], [torch.zeros(4, 4, dtype=torch.int8)], "values must be float16"),
        ([torch.zeros(4, 4)], [torch.zeros(4, 4)], "kept must be int8 or int32"),
        ([torch.zeros(4, 4).t()[:, 1:]], [torch.zeros(4, 3, dtype=torch.int8)], "must be contiguous"),
        ([torch.zeros(4, 4)], [torch.zeros(3, 4, dtype=torch.int8)], r"values of shape \(4, 4\), got \(3, 4\)"),
        ([torch.zeros(4, 4)], [torch.zeros(4, 3, dtype=torch.int8)], r"got \(4, 3\)"),
        ([torch.zeros(4, 4)], [torch.zeros(0, 4, dtype=torch.int8)], r"got \(0, 4\)"),
        ([torch.zeros(())], [torch.zeros((), dtype=torch.int8)], "must have dimensions"),
    ],
)
def test_the_operator_refuses(values: list[Tensor], kept: list[Tensor], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fxprune.clear_pruned(values, kept)


def test_bits_of_tiles_are_shared() -> None:
    mask = torch.rand(4, 6) < 0.5
    assert bits(mask.repeat_interleave(32, 0)).shape == (4, 6) and bits(mask).dtype == torch.int8
    assert bits(mask.repeat_interleave(32, 0)).dtype == torch.int32


@pytest.mark.parametrize("shared", [1, 32])
def test_bits_fit_operator_and_reference(shared: int) -> None:
    """The reference runs where no kernel was built."""
    mask = (torch.rand(4, 6) < 0.5).repeat_interleave(shared, 0)
    for clear in (torch.ops.fxprune.clear_pruned, reference):
        value = torch.ones(4 * shared, 6)
        clear([value], [bits(mask)])
        assert torch.equal(value, mask.float())
