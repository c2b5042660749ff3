"""Sparse or dense, and why: every reason of the report is reached, and a loser never leaves dense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from fxprune.lowering import library
from torch import Tensor, nn

import fxprune
from fxprune import pipeline
from fxprune.context import Timing
from fxprune.decisions import LAST_REPORTS
from fxprune.match import Match
from fxprune.plan import lookup
from tests.oracle import Run, assert_exact, check, compiled, integer_model, integers, rewritten, zero_some

X = integers(2, 8, 6, 6, seed=7)


def separable() -> nn.Module:
    layers = [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 16, 1), nn.Conv2d(16, 8, 1)]
    return zero_some(integer_model(nn.Sequential(*layers)))


def timed(monkeypatch: pytest.MonkeyPatch, times: Callable[[str], tuple[float, float, float]]) -> None:
    """Replace the measurements: ``times(kind)`` is (sparse, dense, dense feature-major)."""

    class Fake:
        seconds = 0.0

        def __init__(self, *_: object) -> None:
            return

        def __call__(self, match: object, mask: object) -> Timing:
            return Timing(*times(match.kind), measured=True)  # type: ignore[attr-defined]

        predict = __call__

    monkeypatch.setattr(pipeline, "Measure", Fake)


def verdicts(run: Run) -> list[tuple[bool, str]]:
    return [(d.chosen, d.reason) for d in run.context.decisions]


def test_faster_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda kind: (1.0, 2.0, 3.0))
    run = check(separable(), X, min_speedup=1.02)
    assert verdicts(run) == [(True, "2.00x of dense")] * 3
    assert run.ops == {"depthwise_taps": 1, "tile_gemm": 2}


def test_slower_region_stays_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda kind: (4.0, 2.0, 3.0))
    run = check(separable(), X, min_speedup=1.02)
    assert not run.changed and run.ops == {"conv2d": 3}
    assert all(not chosen and "kept dense: its region of 3 layers reaches 0.67x" in why for chosen, why in verdicts(run))


@pytest.mark.parametrize("layers", [1, 3])
def test_layers_of_a_region_are_timed_with_an_image_a_thread(layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All images at once take our kernels ten times as long as by two."""

    def measure(match: Match, mask: object) -> Timing:
        batch = match.geometry.x[0]
        assert match.geometry.y[0] == batch
        return Timing(10.0 * batch if batch > 2 else 1.0 * batch, 2.0 * batch, 3.0 * batch, measured=True)

    class Fake:
        seconds = 0.0

        def __init__(self, *_: object) -> None:
            self.predict = measure

        __call__ = staticmethod(measure)

    monkeypatch.setattr(pipeline, "Measure", Fake)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = integers(6, 8, 6, 6, seed=7)
    run = check(separable()[:layers], x, min_speedup=1.02)
    if layers > 1:
        assert verdicts(run) == [(True, "2.00x of dense")] * layers
    else:  # alone it is no region
        assert not run.changed and verdicts(run) == [(False, "kept dense: its region of 1 layers reaches 0.67x of dense")]


def test_one_slow_layer_stays_dense_inside_a_winning_region(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda kind: (9.0, 3.0, 3.0) if kind == "depthwise" else (1.0, 9.0, 9.0))
    run = check(separable(), X, min_speedup=1.02)
    assert [chosen for chosen, _ in verdicts(run)] == [False, True, True]
    assert "kept dense in its feature-major region" in verdicts(run)[0][1] and run.ops["conv2d"] == 1


def test_a_dense_layer_joins_its_region(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda kind: (1.0, 2.0, 3.0))
    model = separable()
    model[1].weight.data.copy_(integers(16, 8, 1, 1, low=1, high=2))
    run = check(model, X, min_speedup=1.02)
    assert verdicts(run)[1] == (True, "no zeros, joins its feature-major region: 2.00x of dense")
    assert run.ops["tile_gemm"] == 2


@pytest.mark.parametrize("least, chosen", [(1.4, True), (1.6, False)])
def test_min_speedup_decides_a_linear(monkeypatch: pytest.MonkeyPatch, least: float, chosen: bool) -> None:
    timed(monkeypatch, lambda kind: (2.0, 3.0, 3.0))
    run = check(zero_some(integer_model(nn.Linear(16, 64))), integers(5, 16), min_speedup=least)
    assert verdicts(run) == [(chosen, "1.50x of dense" if chosen else "kept dense: 1.50x of dense")]


def test_no_zeros_is_never_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(kind: str) -> tuple[float, float, float]:
        raise AssertionError(f"a dense {kind} was measured")

    timed(monkeypatch, fail)
    model = integer_model(nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(64, 9)))
    for parameter in model.parameters():
        parameter.data.copy_(integers(*parameter.shape, low=1, high=3))
    assert verdicts(check(model, X)) == [(False, "no zeros")] * 3


@pytest.mark.parametrize("share, chosen", [(0.02, False), (0.3, True)])
def test_a_few_zeros_count_as_dense(share: float, chosen: bool) -> None:
    model = integer_model(nn.Conv2d(100, 100, 3, groups=100))
    model.weight.data.copy_(integers(*model.weight.shape, low=1, high=3))
    model.weight.data.flatten()[: int(share * 900)] = 0
    assert rewritten(model, integers(1, 100, 5, 5)).changed == chosen


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_stay_dense_with_the_reason(dtype: torch.dtype) -> None:
    run = rewritten(separable().to(dtype), X.to(dtype))
    assert not run.changed
    assert all(f"needs float32 or bfloat16, got {str(dtype)[6:]}" in why for _, why in verdicts(run))


def test_autocast_to_another_dtype_stays_dense_with_the_reason() -> None:
    fast = compiled(separable())
    with torch.no_grad(), torch.autocast("cpu", torch.float16):
        fast.call(X)
    reasons = {d.reason for d in LAST_REPORTS[-1].decisions}
    assert reasons == {"autocast is on for torch.float16, kernels are float32 or bfloat16"}


def test_a_plan_wins_over_found_zeros() -> None:
    pruned = fxprune.prune(integer_model(nn.Conv2d(8, 8, 3, groups=8)), X, sparsity=0.6)
    assert [d.pattern for d in check(pruned.model, X).context.decisions] == ["dcp"]


def test_a_plan_the_weight_no_longer_obeys_gives_way_to_the_zeros_there_are() -> None:
    pruned = fxprune.prune(integer_model(nn.Conv2d(8, 8, 3, groups=8)), X, sparsity=0.6)
    pruned.model.weight.data[0] = 1
    (decision,) = check(pruned.model, X).context.decisions
    assert decision.pattern == "found" and decision.mask is not None and bool(decision.mask.mask[0].all())


class BothWays(nn.Module):
    """A layer and its mirror image: one call reads the transpose of what the other does."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.encode = nn.Linear(24, wide, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(self.encode(x)), self.encode.weight.t())


@pytest.mark.parametrize("wide", (40, 24))
def test_a_weight_read_both_ways_has_one_mask(wide: int) -> None:
    x = integers(5, 24, seed=3)
    pruned = fxprune.prune(integer_model(BothWays(wide)), x, sparsity=0.6, granularity=8).model
    decisions = check(pruned, x).context.decisions
    assert [d.match.transposed for d in decisions] == [False, True] and all(d.chosen for d in decisions)


@pytest.mark.parametrize("wide", (40, 24))
def test_a_weight_read_both_ways_is_pruned_once_by_the_compile(wide: int) -> None:
    x, model = integers(5, 24, seed=3), integer_model(BothWays(wide))
    given = rewritten(model, x, sparsity=0.6, granularity=8)
    assert all(d.chosen for d in given.context.decisions)
    assert_exact(given.output, fxprune.prune(model, x, sparsity=0.6, granularity=8).model(x))


@pytest.mark.parametrize("wide", (40, 24))
def test_a_weight_read_both_ways_trains_under_its_mask(wide: int) -> None:
    x = integers(5, 24, seed=3)
    model = fxprune.prune(integer_model(BothWays(wide)), x, sparsity=0.6, granularity=8).model
    weight, fast, results = model.encode.weight, compiled(model), []
    for call in (fast.call, model):
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        results.append([y.detach(), *torch.autograd.grad(y, [leaf, weight], integers(*y.shape, seed=4))])
    pruned = lookup(weight)
    assert pruned is not None and all(d.chosen for d in fast.contexts[0].decisions)
    results[1][2] = results[1][2] * pruned.mask
    for ours, dense in zip(*results, strict=True):
        assert_exact(ours, dense, trusted=False)


def test_nan_is_not_a_zero() -> None:
    model = separable()
    model[0].weight.data[0, 0, 0, 0] = torch.nan
    run = rewritten(model, X)
    ours, eager = run.output[0].isnan(), run.expected[0].isnan()
    assert eager.any() and not (eager & ~ours).any()
    # Without masked arithmetic, padding is a zero that is multiplied, too.
    assert torch.equal(ours, eager) or library.isa() in ("avx2", "scalar")


@pytest.mark.parametrize("model, regions", [(separable, 1), (lambda: split(), 2)])
def test_regions(monkeypatch: pytest.MonkeyPatch, model: Callable[[], nn.Module], regions: int) -> None:
    """Convolutions that exchange activations decide together; a linear layer between them splits them."""
    timed(monkeypatch, lambda kind: (4.0, 2.0, 3.0))
    run = rewritten(model(), X, min_speedup=1.02)
    sizes = [d.reason for d in run.context.decisions if d.match.kind != "linear"]
    assert all(f"region of {3 // regions} layer" in why for why in sizes), sizes


def split() -> nn.Module:
    """Two convolutions that share only the model's input."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 1)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a(x + 1), self.b(x - 1)

    return zero_some(integer_model(Branches()))


ADDRESSED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a view beside a write": lambda y: y.permute(0, 2, 3, 1).view(2, -1) + torch.ones(1).add_(1),
    "as_strided": lambda y: y.as_strided((2, 16, 6, 6), (576, 1, 96, 16)) + 0,
    "torch.as_strided": lambda y: torch.as_strided(y, (2, 16, 6, 6), (576, 1, 96, 16)) + 0,
}


class Addressed(nn.Module):
    def __init__(self, body: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.conv, self.body = nn.Conv2d(8, 16, 1), body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(self.conv(x))


@pytest.mark.parametrize("name", ADDRESSED)
def test_memory_of_a_channels_last_result_is_not_addressed_in_another_layout(name: str) -> None:
    model = zero_some(integer_model(Addressed(ADDRESSED[name])))
    x = X.contiguous(memory_format=torch.channels_last)
    run = check(model, x)
    assert not run.changed and "channels-last" in run.context.decisions[0].reason


def test_channels_last_without_addressing_runs_sparse() -> None:
    model = zero_some(integer_model(Addressed(lambda y: y.permute(0, 2, 3, 1).flatten(1))))
    assert check(model, X.contiguous(memory_format=torch.channels_last)).ops["tile_gemm"] == 1
    assert check(zero_some(integer_model(Addressed(lambda y: y.view(2, -1)))), X).ops["tile_gemm"] == 1
