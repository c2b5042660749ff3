"""A weight that changes after compile is never served from a stale pack."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune.compiled import CompiledGraph
from tests.oracle import Compiled, assert_exact, compiled, integers
from tests.toys import image, mlp, mobile, pruned, rows, run


def ready(model: nn.Module, *inputs: torch.Tensor, **options: object) -> Compiled:
    """Compile, and check that the first call is right and sparse."""
    fast = compiled(model, **options)
    assert_exact(run(fast.call, *inputs), run(model, *inputs), "first call")
    assert any(d.chosen for context in fast.contexts for d in context.decisions)
    return fast


def double_kept(model: nn.Module) -> None:
    with torch.no_grad():
        model.fc.weight.mul_(2)


def new_values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v * 4 if v.is_floating_point() else v for k, v in copy.deepcopy(model.state_dict()).items()}


def step(make: Callable[..., torch.optim.Optimizer]) -> Callable[[nn.Module], None]:
    """One optimizer step whose gradients keep the support and the integers."""

    def change(model: nn.Module) -> None:
        for parameter in model.parameters():
            parameter.grad = -parameter.detach().clone()
        make(model.parameters()).step()
        for parameter in model.parameters():
            parameter.grad = None

    return change


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "in place": double_kept,
    "load_state_dict": lambda m: m.load_state_dict(new_values(m)),
    "load_state_dict assign": lambda m: m.load_state_dict(new_values(m), assign=True),
    "data replaced": lambda m: setattr(m.fc.weight, "data", m.fc.weight.data * 2),
    "parameter replaced": lambda m: setattr(m.fc, "weight", nn.Parameter(m.fc.weight.detach() * 2)),
    "SGD": step(lambda p: torch.optim.SGD(p, lr=1.0)),
    "Adam foreach": step(lambda p: torch.optim.Adam(p, lr=1.0, betas=(0.0, 0.0), foreach=True)),
    "SGD fused": step(lambda p: torch.optim.SGD(p, lr=1.0, fused=True)),
    "Adam fused": step(lambda p: torch.optim.Adam(p, lr=1.0, betas=(0.0, 0.0), fused=True)),
    "BatchNorm statistics": lambda m: m.bn1.running_mean.add_(1),
    "BatchNorm scale": lambda m: m.bn2.weight.data.mul_(2) is None or fxprune.refresh(m),
    "bias": lambda m: run(m.fc.bias.add_, 3),
    "support grows": lambda m: run(m.pw.weight.fill_, 1.0),
    "support shrinks": lambda m: run(m.dw.weight[:, :, 0].zero_),
    "everything is dense": lambda m: [run(p.fill_, 1.0 + i % 2) for i, p in enumerate(m.parameters())],
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_is_seen(name: str) -> None:
    model, x = pruned(mobile(), image()), image()
    fast = ready(model, x)
    before = run(model, x)
    CHANGES[name](model)
    expected = run(model, x)
    assert not torch.equal(before, expected), f"the change {name!r} changes nothing"
    for call in range(3):
        assert_exact(run(fast.call, x), expected, f"CHANGES[{name!r}], call {call}")


def test_data_edit_needs_refresh() -> None:
    model, x = pruned(mlp(), rows()), rows()
    fast = ready(model, x)
    model[0].weight.data.mul_(2)
    assert fxprune.refresh(model) == 1
    assert_exact(run(fast.call, x), run(model, x))
    model[0].weight.data.fill_(1.0)  # a refresh that finds another support
    assert fxprune.refresh(model) == 1
    assert_exact(run(fast.call, x), run(model, x))


def test_refresh_of_another_model_touches_nothing() -> None:
    model, x = pruned(mlp(), rows()), rows()
    ready(model, x)
    assert fxprune.refresh(mlp(1)) == 0


def test_values_are_repacked_into_the_same_buffers() -> None:
    model, x = pruned(mlp(), rows()), rows()
    fast = ready(model, x)
    weights = fast.contexts[0].weights
    before = [weights.value(node).data_ptr() for entry in weights.derived for node in entry.nodes]
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert_exact(run(fast.call, x), run(model, x))
    assert fast.contexts[0].weights is weights, "a change of values must not rebuild"
    assert [weights.value(node).data_ptr() for entry in weights.derived for node in entry.nodes] == before


def test_a_rebuild_knows_names_and_folds_batchnorm() -> None:
    model, x = pruned(mobile(), image()), image()
    fast = ready(model, x)
    first = fast.contexts[0]
    with torch.no_grad():
        model.pw.weight[:8] = 1.0
    assert_exact(run(fast.call, x), run(model, x))
    again = fast.contexts[0]
    assert again is not first
    assert [d.match.name for d in again.decisions] == [d.match.name for d in first.decisions] == ["dw", "pw", "fc"]
    assert again.counts["fold_batchnorm"] == first.counts["fold_batchnorm"] == 2


def test_two_models_of_one_class_keep_their_own_weights() -> None:
    models = [pruned(mlp(seed), rows()) for seed in range(3)]
    options = {"fallback": "eager", "autotune": "off", "min_speedup": 0.0}
    graphs = [torch.compile(m, backend="hwprune", options=options) for m in models]
    for turn in range(2):
        for i, (fast, model) in enumerate(zip(graphs, models, strict=True)):
            assert_exact(run(fast, rows()), run(model, rows()), f"turn {turn}, model {i}")


def test_a_weight_given_as_an_argument() -> None:
    weights = [pruned(mlp(seed), rows())[0].weight for seed in range(2)]
    weights.append(nn.Parameter(integers(64, 32, seed=5)))
    fast = compiled(lambda x, w: F.linear(x, w))  # type: ignore[arg-type]
    for i in (0, 1, 2, 0):
        assert_exact(run(fast.call, rows(), weights[i]), F.linear(rows(), weights[i]).detach(), f"weight {i}")


def test_frozen_weights_are_not_watched_but_still_told_apart() -> None:
    first, second = pruned(mlp(0), rows()), pruned(mlp(1), rows())
    fast = compiled(first, freeze=True)
    assert_exact(run(fast.call, rows()), run(first, rows()))
    assert fxprune.refresh(first) == 0
    first.load_state_dict(second.state_dict(), assign=True)
    assert_exact(run(fast.call, rows()), run(first, rows()))


def test_changes_under_inference_mode() -> None:
    with torch.inference_mode():
        model = pruned(mlp(), rows())
        fast = compiled(model)
        assert_exact(fast.call(rows()), model(rows()))
        model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True)
        assert_exact(fast.call(rows()), model(rows()))
        model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()})
        assert_exact(fast.call(rows()), model(rows()))


def test_inference_tensors_that_change_in_place() -> None:
    """They have no version."""
    with torch.inference_mode():
        model = pruned(mlp(), rows())
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
        assert all(p.is_inference() for p in model.parameters())
        fast = compiled(model)
        assert_exact(fast.call(rows()), model(rows()))
        for step in range(3):
            model[0].weight.mul_(-1 if step else 2)
            assert_exact(fast.call(rows()), model(rows()), f"step {step}")


def test_variants_are_bounded() -> None:
    from fxprune import compiled as module

    model, x = pruned(mlp(), rows()), rows()
    fast = ready(model, x)
    (graph,) = [g for g in fast.graphs if isinstance(g, CompiledGraph)]
    limit, module._MOST = module._MOST, 3
    weights = []  # a variant goes with its weights
    try:
        for seed in range(5):
            weights.append(list(model.parameters()))
            model.load_state_dict(pruned(mlp(seed), x).state_dict(), assign=True)
            assert_exact(run(fast.call, x), run(model, x), f"seed {seed}")
    finally:
        module._MOST = limit
    assert len(graph._variants) == 3


def test_a_model_compiled_dense_first_runs_sparse_once_pruned() -> None:
    """Dynamo shares the graph between the model and its pruned copy, and between before and after."""
    model = mlp()
    fast = compiled(model)
    assert_exact(run(fast.call, rows()), run(model, rows()))
    assert not fast.contexts
    fxprune.prune(model, rows(), sparsity=0.5, inplace=True)
    assert_exact(run(fast.call, rows()), run(model, rows()))
    assert all(d.chosen for d in fast.contexts[-1].decisions), "the graph looked again after prune(inplace=True)"
