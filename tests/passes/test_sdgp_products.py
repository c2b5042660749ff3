"""The products of SDGP that skip zeros: where they stand in a backward graph, and that no gradient changes by a bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fxprune.lowering import measure_gradient
from fxprune.lowering.kernels import libraries
from fxprune.lowering.measure_gradient import MeasureGradient
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fxprune
from fxprune.gradients import GradientTimes, gradient_clock
from fxprune.ops import nm_mm
from tests.oracle import FORCED, integer_model, integers
from tests.sdgp import gradients, watched

SKIPS, PRUNE = ("fxprune.skip_zeros_mm.default", "fxprune.skip_zeros_conv.default"), "fxprune.nm_prune.default"
HALVES = "fxprune.nm_mm.default"
FASTER = GradientTimes(3.0, 2.0, 1.0)


@pytest.fixture(autouse=True)
def clock() -> Iterator[None]:
    gradient_clock.load_state_dict({"step": 0, "call": 0})
    yield
    torch._dynamo.reset()


def run(model: nn.Module, x: Tensor, **options: Any) -> tuple[dict[str, Any], Any]:
    """Return every gradient, and the operators of the backward graph."""
    torch._dynamo.reset()
    settings = {**FORCED, "grad_sparsity": "2:4", **options}
    with watched() as seen:
        found = gradients(model, torch.compile(model, backend=fxprune.hwprune, options=settings), x)
    return found, seen.operators[0]


def skipping(operators: Any) -> int:
    return sum(operators[name] for name in SKIPS)


def check(monkeypatch: pytest.MonkeyPatch, model: nn.Module, x: Tensor, skips: int, **options: Any) -> None:
    """Compare with the dense product of the same pruned gradients, on integers."""
    expected, plain = run(model, x, **options)
    monkeypatch.setattr(MeasureGradient, "__call__", lambda self, *layer: FASTER)
    given, operators = run(model, x, **options)
    assert skipping(plain) == 0 and plain[PRUNE] == operators[PRUNE] > 0
    assert skipping(operators) == skips
    for name, right in expected.items():
        assert (given[name] is None) == (right is None), name
        assert right is None or (torch.equal(given[name], right) and given[name].stride() == right.stride()), name


def image(channels: int = 8) -> Tensor:
    return integers(2, channels, 5, 6, seed=7)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class Product(nn.Module):
    """x @ weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 12))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


# layer, input, how many products skip zeros
LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], int]] = {
    "linear": (lambda: nn.Linear(8, 12), lambda: integers(5, 8), 1),
    "linear 3d": (lambda: nn.Linear(8, 13), lambda: integers(2, 5, 8), 1),
    "matmul": (Product, lambda: integers(5, 8), 1),
    "matmul 3d": (Product, lambda: integers(2, 5, 8), 1),
    "pointwise": (lambda: nn.Conv2d(8, 12, 1), image, 1),
    "no bias": (lambda: nn.Conv2d(8, 12, 1, bias=False), image, 1),
    "channels last": (lambda: nn.Conv2d(8, 12, 1).to(memory_format=torch.channels_last), lambda: last(image()), 1),
    "last weight": (lambda: nn.Conv2d(8, 12, 1).to(memory_format=torch.channels_last), image, 1),
    "one pixel": (lambda: nn.Conv2d(8, 12, 1), lambda: integers(5, 8, 1, 1), 1),
    "conv1d": (lambda: nn.Conv1d(8, 12, 1), lambda: integers(2, 8, 9), 1),
    "conv3d": (lambda: nn.Conv3d(8, 12, 1), lambda: integers(2, 8, 3, 2, 5), 1),
    "window": (lambda: nn.Conv2d(8, 12, 3, padding=1), image, 1),
    "window, no bias": (lambda: nn.Conv2d(8, 12, 3, bias=False), image, 1),
    "window, last": (lambda: nn.Conv2d(8, 12, 3, padding=1).to(memory_format=torch.channels_last), lambda: last(image()), 1),
    "window, last weight": (lambda: nn.Conv2d(8, 12, 3, padding=1).to(memory_format=torch.channels_last), image, 1),
    "long window": (lambda: nn.Conv2d(8, 12, (1, 5), padding=(0, 2)), image, 1),
    "same": (lambda: nn.Conv2d(8, 12, 3, padding="same"), image, 1),
    "window, stride": (lambda: nn.Conv2d(8, 12, 3, stride=2), image, 0),
    "window, groups": (lambda: nn.Conv2d(8, 12, 3, groups=2), image, 0),
    "dilated": (lambda: nn.Conv2d(8, 12, 3, dilation=2), image, 0),
    "wide padding": (lambda: nn.Conv2d(8, 12, 3, padding=3), image, 0),
    "window 1d": (lambda: nn.Conv1d(8, 12, 3), lambda: integers(2, 8, 9), 0),
    "stride": (lambda: nn.Conv2d(8, 12, 1, stride=2), image, 0),
    "padding": (lambda: nn.Conv2d(8, 12, 1, padding=1), image, 0),
    "groups": (lambda: nn.Conv2d(8, 12, 1, groups=2), image, 0),
    "transposed": (lambda: nn.ConvTranspose2d(8, 12, 1), image, 0),
    "bfloat16": (lambda: nn.Linear(8, 12).bfloat16(), lambda: integers(5, 8).bfloat16(), 0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, data, skips = LAYERS[name]
    check(monkeypatch, integer_model(make()).train(), data().requires_grad_(), skips)


@pytest.mark.parametrize(("target", "skips"), [("dX", 1), ("dW", 0), ("both", 1)])
@pytest.mark.parametrize("name", ["linear 3d", "pointwise", "window"])
def test_targets(name: str, target: str, skips: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make, data, _ = LAYERS[name]
    check(monkeypatch, integer_model(make()).train(), data().requires_grad_(), skips, grad_target=target)


@pytest.mark.parametrize("function", ["magnitude", "rescaled_magnitude"])
@pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8)])
def test_sparse_tensor_cores(shape: tuple[int, ...], function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU runs 16-bit linear layers; the product prunes by itself where it can."""
    model, x = integer_model(nn.Linear(8, 12)).train().bfloat16(), integers(*shape).bfloat16().requires_grad_()
    expected, plain = run(model, x, grad_pruning=function)
    monkeypatch.setattr(MeasureGradient, "__call__", lambda self, *layer: FASTER)
    monkeypatch.setattr(
        nm_mm, "runs", lambda x, weight, n, m: (n, m) == (2, 4) and x.dtype == weight.dtype == torch.bfloat16
    )
    given, operators = run(model, x, grad_pruning=function)
    assert plain[HALVES] == 0 and plain[PRUNE] == 1
    assert operators[HALVES] == 1 and operators[PRUNE] == (function != "magnitude")
    assert expected.keys() == given.keys()
    for name, right in expected.items():
        assert right is None or torch.equal(given[name], right), name


@pytest.mark.parametrize("right", (True, False))
def test_a_library_multiplies_where_it_is_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch, right: bool) -> None:
    """The measurement is the real one, on the CPU; of the times alone the library's is made the best."""
    model, x = integer_model(nn.Linear(16, 12)).bfloat16(), integers(5, 16, seed=7).bfloat16().requires_grad_()
    expected, _ = run(model, x)
    monkeypatch.setattr(
        nm_mm, "runs", lambda x, weight, n, m: (n, m) == (2, 4) and x.dtype == weight.dtype == torch.bfloat16
    )
    product = libraries.PRODUCTS["cusparselt"] if not right else lambda a, b: (a.float() @ b.float()).to(a.dtype)
    monkeypatch.setattr(libraries, "PRODUCTS", {"given": product})
    monkeypatch.setattr(libraries, "missing", lambda name, device, dtype: libraries.probe(product, device, dtype))
    timed: list[int] = []

    def times(runs: Any, rounds: int) -> Any:
        timed.append(len(runs))
        assert all(torch.equal(call(), runs[2]()) for call in runs[3:])
        return [4.0, 5.0, 3.0, 2.0][: len(runs)], True

    monkeypatch.setattr(measure_gradient, "interleave", times)
    given, operators = run(model, x, autotune="fast")
    assert timed == [4 if right else 3]
    assert operators["fxprune_library.nm_mm.default"] == right and operators[HALVES] == (not right)
    for name, value in expected.items():
        assert value is None or torch.equal(given[name], value), name


def test_what_the_sparse_tensor_cores_take() -> None:
    with FakeTensorMode():
        x, weight = (torch.empty(shape, device="cuda", dtype=torch.float16) for shape in ((5, 8), (8, 12)))
        uneven, single = torch.empty(5, 6, device="cuda", dtype=torch.float16), torch.empty(5, 8, device="cuda")
    assert nm_mm.runs(x, weight, 2, 4) and nm_mm.runs(x, weight, 1, 4)
    assert not nm_mm.runs(x, weight, 4, 8) and not nm_mm.runs(x, weight, 3, 4)
    assert not nm_mm.runs(uneven, weight, 2, 4) and not nm_mm.runs(single, weight, 2, 4)
    assert not nm_mm.runs(torch.empty(5, 8).half(), weight, 2, 4)


class Mixed(nn.Module):
    """A residual block, tokens, a view of a data gradient, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1, bias=False)
        self.twice, self.head = nn.Linear(8, 8), nn.Linear(8 * 30, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.c(F.relu(self.b(F.relu(self.a(x)))))
        tokens = self.twice(self.twice(y.flatten(2).transpose(1, 2)).relu())
        return self.head(tokens.flatten(1))


@pytest.mark.parametrize("fallback", ["eager", "inductor"])
def test_a_model(fallback: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check(monkeypatch, integer_model(Mixed()).train(), image().requires_grad_(), 6, fallback=fallback)


def test_a_symbolic_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MeasureGradient, "__call__", lambda self, *layer: FASTER)
    model = integer_model(Mixed()).train()
    call = torch.compile(model, backend=fxprune.hwprune, dynamic=True, options={**FORCED, "grad_sparsity": "2:4"})
    with watched() as seen:
        found = [gradients(model, call, integers(batch, 8, 5, 6, seed=7)) for batch in (3, 5)]
    assert [skipping(operators) for operators in seen.operators] == [5]  # the image needs no gradient
    monkeypatch.undo()
    for batch, given in zip((3, 5), found, strict=True):
        expected, _ = run(model, integers(batch, 8, 5, 6, seed=7))
        assert all(torch.equal(given[name], expected[name]) for name in expected if expected[name] is not None)


def test_other_products_have_another_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = integer_model(nn.Linear(8, 12)).train(), integers(5, 8).requires_grad_()
    expected, _ = run(model, x, fallback="inductor")
    monkeypatch.setattr(MeasureGradient, "__call__", lambda self, *layer: FASTER)
    given, operators = run(model, x, fallback="inductor")
    assert skipping(operators) == 1 and torch.equal(given["input 0"], expected["input 0"])
