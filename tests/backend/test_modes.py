"""How and where a compiled model is called: grad modes, autocast, threads, copies, shared weights, odd inputs."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.decisions import LAST_REPORTS
from fxprune.plan import lookup
from tests.oracle import FORCED, assert_exact, compiled, integer_model, integers
from tests.toys import Tied, image, mlp, mobile, pruned, rows, run


def test_grad_modes_take_turns() -> None:
    model = pruned(mobile(), image())
    fast, expected = compiled(model), run(model, image())
    for turn in range(2):
        with torch.inference_mode():
            assert_exact(fast.call(image()), expected, f"inference_mode, turn {turn}")
        with torch.no_grad():
            assert_exact(fast.call(image()), expected, f"no_grad, turn {turn}")
        output = fast.call(image())
        assert output.requires_grad
        assert_exact(output.detach(), expected, f"grad, turn {turn}")


def test_train_and_eval_take_turns() -> None:
    model = pruned(mobile(), image())
    model.bn1.eps = model.bn2.eps = 1e-5
    twin = copy.deepcopy(model)
    fast = compiled(model)
    for turn, training in enumerate((False, True, False, True)):
        model.train(training)
        twin.train(training)
        given, expected = run(fast.call, image()), run(twin, image())
        torch.testing.assert_close(given, expected, msg=f"turn {turn}, training {training}")
        for (name, a), b in zip(model.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, b, msg=f"buffer {name}, turn {turn}")


def test_autocast_and_float32_take_turns_and_run_sparse() -> None:
    model = pruned(mlp(), rows())
    fast = compiled(model)
    for turn in range(2):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            given, expected = fast.call(rows()), model(rows())
        assert given.dtype == expected.dtype == torch.bfloat16
        assert_exact(given, expected, f"autocast, turn {turn}")
        assert_exact(run(fast.call, rows()), run(model, rows()), f"float32, turn {turn}")
    assert len(fast.contexts) == 2 and all(d.chosen for c in fast.contexts for d in c.decisions)


def test_training_under_autocast_is_dense_with_a_reason() -> None:
    model = pruned(mlp(), rows())
    twin = copy.deepcopy(model)
    fast = compiled(model)
    for each in (fast.call, twin):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            each(rows()).float().square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert_exact(a.grad, b.grad, name, most_zeros=1.0)
    assert {d.reason for d in LAST_REPORTS[-1].decisions} == {"autocast is on while gradients are needed"}


class Inside(nn.Module):
    """A layer in an autocast block of the model's own."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.body, self.enabled = mlp(), enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            return self.body(x)


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_inside_the_model_counts_when_it_is_switched_on(enabled: bool) -> None:
    model = pruned(Inside(enabled), rows())
    fast = compiled(model)
    assert_exact(run(fast.call, rows()), run(model, rows()))
    decisions = [d for c in fast.contexts for d in c.decisions]
    assert any(d.chosen for d in decisions) is not enabled


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_stay_dense(dtype: torch.dtype) -> None:
    model = pruned(mlp(), rows()).to(dtype)
    x = rows().to(dtype)
    fast = compiled(model)
    assert_exact(run(fast.call, x), run(model, x))
    table = fxprune.explain(model, x, autotune="off", min_speedup=0.0)
    assert all(f"needs float32 or bfloat16, got {str(dtype)[6:]}" in row[-1] for row in table.rows)


def test_thread_counts_give_the_same_bits() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.GELU(), nn.Conv2d(32, 64, 1))
    model = pruned(layers.eval(), torch.randn(1, 32, 9, 9))
    fast, x, threads = compiled(model), torch.randn(3, 32, 9, 9), torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            outputs.append(run(fast.call, x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
    torch.testing.assert_close(outputs[0], run(model, x))


def test_compile_and_call_from_other_threads() -> None:
    models = [pruned(mlp(seed), rows()) for seed in range(2)]
    results: dict[int, Tensor] = {}

    def work(i: int) -> None:
        results[i] = run(torch.compile(models[i], backend="hwprune", options=FORCED), rows())

    for i in range(2):
        thread = threading.Thread(target=work, args=(i,))
        thread.start()
        thread.join()
    for i, model in enumerate(models):
        assert_exact(results[i], run(model, rows()), f"thread {i}")


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_made_after_compile_lives_its_own_life(clone: Callable[[nn.Module], nn.Module]) -> None:
    model = pruned(mobile(), image())
    fast = compiled(model)
    run(fast.call, image())
    twin = clone(model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        twin.fc.weight.mul_(3)
    assert_exact(run(compiled(twin).call, image()), run(twin, image()), "the copy")
    assert_exact(run(fast.call, image()), run(model, image()), "the original")


def test_folded_batchnorm_statistics_move_without_an_optimizer() -> None:
    """PyTorch does not count a training forward as a change of the running statistics."""
    layers = (nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 16, 1))
    model = pruned(nn.Sequential(*layers).eval(), image())
    fast = compiled(model)
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(fast.call(image()), model(image()))
            model.train()
            model(image())
            model.eval()
    assert all(c.counts["fold_batchnorm"] for c in fast.contexts)


def test_state_dict_round_trip() -> None:
    model = pruned(mobile(), image())
    keys, kept = list(mobile().state_dict()), {k: v != 0 for k, v in model.state_dict().items()}
    fast = torch.compile(model, backend="hwprune", options=FORCED)
    run(fast, image())
    assert list(model.state_dict()) == keys
    assert [k.removeprefix("_orig_mod.") for k in fast.state_dict()] == keys
    fresh = mobile(3)
    fresh.load_state_dict(model.state_dict())
    assert all(torch.equal(v != 0, kept[k]) for k, v in fresh.state_dict().items()), "the mask is in the zeros"
    again = compiled(fresh)
    assert_exact(run(again.call, image()), run(model, image()))
    assert {d.pattern.partition(" ")[0] for d in again.contexts[0].decisions if d.mask is not None} == {"found"}


def test_a_weight_tied_to_an_embedding_is_not_pruned() -> None:
    model, tokens = integer_model(Tied()), integers(2, 5, low=0, high=47).long()
    before = model.head.weight.detach().clone()
    result = fxprune.prune(model, tokens, sparsity=0.5)
    assert [layer.name for layer in result.plan] == ["middle"]
    assert torch.equal(result.model.head.weight, before)
    assert result.model.head.weight is result.model.embedding.weight
    fast = compiled(result.model)
    assert_exact(run(fast.call, tokens), run(result.model, tokens))


def test_a_tied_weight_with_zeros_serves_both_users() -> None:
    model, tokens = integer_model(Tied()), integers(2, 5, low=0, high=47).long()
    model.head.weight.data[:, ::2] = 0
    fast = compiled(model)
    assert_exact(run(fast.call, tokens), run(model, tokens))
    with torch.no_grad():
        model.embedding.weight.mul_(2)
    assert_exact(run(fast.call, tokens), run(model, tokens), "after a change")


def test_a_layer_used_twice_is_planned_once_and_rewritten_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(torch.relu(self.shared(x)))

    result = fxprune.prune(integer_model(Twice()), rows(), sparsity=0.5)
    assert len(result.plan) == 1 and abs(result.sparsity["all"] - 0.5) <= 0.005
    fast = compiled(result.model)
    assert_exact(run(fast.call, rows()), run(result.model, rows()))
    assert [d.chosen for d in fast.contexts[0].decisions] == [True, True]


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3),
    "sliced": lambda x: torch.stack([x, -x], -1)[..., 0],
    "every second": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "offset storage": lambda x: torch.cat([x[:1], x])[1:],
    "expanded batch": lambda x: x[:1].expand(3, -1, -1, -1),
    "expanded pixels": lambda x: (x[..., :1] + torch.arange(16)[:, None, None]).expand(-1, -1, -1, 8),
    "odd stride of a size-1 dimension": lambda x: x[:1].as_strided((1, 16, 8, 8), (7777, 64, 8, 1)),
    "no images": lambda x: x[:0],
}


@pytest.mark.parametrize("name", VIEWS)
def test_input_layout(name: str) -> None:
    model, x = pruned(mobile(), image()), VIEWS[name](image(seed=11))
    given, expected = run(compiled(model).call, x), run(model, x)
    assert_exact(given, expected, f"VIEWS[{name!r}]", trusted=bool(x.numel()))
    assert given.stride() == expected.stride()


def test_inputs_are_not_written_and_outputs_alias_nothing() -> None:
    model, x = pruned(mobile(), image()), image()
    fast, before = compiled(model), image()
    first = run(fast.call, x)
    kept = first.clone()
    assert torch.equal(x, before)
    x.zero_()
    run(fast.call, x)
    first.add_(1)
    assert_exact(run(fast.call, before), kept)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_activations_pass_where_weights_are_kept(value: float) -> None:
    model, x = pruned(mlp(), rows(), granularity=16), rows()
    kept = lookup(model[0].weight).mask
    column = int((kept.any(0) & ~kept.all(0)).nonzero()[0])
    first = nn.Sequential(model[0]).eval()
    x[1, column] = value
    y = run(compiled(first).call, x)
    assert torch.equal(~torch.isfinite(y[1]), kept[:, column]), "non-finite exactly where the weight is kept"
    assert_exact(y[[0, 2, 3]], run(first, x)[[0, 2, 3]])


def test_the_same_call_twice_gives_the_same_bits() -> None:
    model, x = pruned(mobile(), image()), torch.randn(2, 16, 8, 8)
    fast = compiled(model)
    first = run(fast.call, x)
    ballast = [torch.randn(1000 + i) for i in range(50)]
    assert torch.equal(run(fast.call, x), first) and len(ballast) == 50
