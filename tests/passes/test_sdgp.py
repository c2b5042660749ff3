"""SDGP over backward graphs: every eligible data gradient is pruned, and nothing else changes by a bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune.decisions import LAST_REPORTS
from fxprune.gradients import gradient_clock
from fxprune.ops import tile_gradients
from fxprune.ops.nm_prune import FUNCTIONS
from fxprune.plan import lookup
from tests.oracle import FORCED, integer_model, integers
from tests.sdgp import Oracle, gradients, watched

PRUNE = "fxprune.nm_prune.default"


@pytest.fixture(autouse=True)
def clock() -> Iterator[None]:
    gradient_clock.load_state_dict({"step": 0, "call": 0})
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module, ratio: Any = "2:4", **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=fxprune.hwprune, options={**FORCED, "grad_sparsity": ratio, **options})


def check(model: nn.Module, *inputs: Tensor, function: str = "magnitude", n: int = 2, m: int = 4, **options: Any) -> int:
    """Compare every gradient with the oracle's, bit for bit; returns how many layers are pruned."""
    oracle = Oracle(model, n, m, function, (options.get("seed", 0), gradient_clock.step, gradient_clock.call))

    def eager(*args: Tensor) -> Tensor:
        with oracle:
            return model(*args)

    expected = gradients(model, eager, *inputs)
    with watched() as seen:
        given = gradients(model, compiled(model, f"{n}:{m}", grad_pruning=function, **options), *inputs)
    assert given.keys() == expected.keys()
    planned = {name: found.mask for name, p in model.named_parameters() if (found := lookup(p)) is not None}
    for name, right in expected.items():
        if name in planned:
            right = right * planned[name]
        if right is None:
            assert given[name] is None, name
        else:
            torch.testing.assert_close(given[name], right, rtol=0, atol=0, msg=lambda m, name=name: f"{name}: {m}")
    assert sum(seen.pruned) == oracle.pruned == sum(ops[PRUNE] for ops in seen.operators)
    assert not any("fxprune_mark" in name for ops in seen.operators for name in ops)
    return oracle.pruned


class Net(nn.Module):
    """A module with a forward given as a function."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self._forward = forward

    def forward(self, *args: Tensor) -> Tensor:
        return self._forward(self, *args)


def net(forward: Callable[..., Tensor], **parts: Any) -> nn.Module:
    return integer_model(Net(forward, **parts)).train()


def image(channels: int = 8, size: int = 6) -> Tensor:
    return integers(2, channels, size, size, seed=7)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "conv": (lambda: nn.Conv2d(8, 12, 3, padding=1), image),
    "no bias": (lambda: nn.Conv2d(8, 12, 3, bias=False), image),
    "stride": (lambda: nn.Conv2d(8, 10, 3, stride=2, padding=1), image),
    "dilation": (lambda: nn.Conv2d(8, 10, 3, dilation=2), image),
    "same": (lambda: nn.Conv2d(8, 10, 3, padding="same", dilation=2), image),
    "reflect": (lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), image),
    "pointwise": (lambda: nn.Conv2d(8, 12, 1), image),
    "one pixel": (lambda: nn.Conv2d(8, 12, 1), lambda: integers(5, 8, 1, 1)),
    "grouped": (lambda: nn.Conv2d(8, 12, 3, groups=2), image),
    "grouped tail": (lambda: nn.Conv2d(12, 18, 3, groups=3), lambda: image(12)),
    "multiplier": (lambda: nn.Conv2d(8, 16, 3, groups=8), image),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3), lambda: integers(2, 8, 9)),
    "conv3d": (lambda: nn.Conv3d(8, 12, 2), lambda: integers(2, 8, 3, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 12, 3, stride=2), image),
    "transposed groups": (lambda: nn.ConvTranspose2d(8, 12, 3, groups=2), image),
    "transposed 1d": (lambda: nn.ConvTranspose1d(8, 12, 3), lambda: integers(2, 8, 9)),
    "linear": (lambda: nn.Linear(8, 12), lambda: integers(5, 8)),
    "linear 3d": (lambda: nn.Linear(8, 12), lambda: integers(2, 5, 8)),
    "linear 4d": (lambda: nn.Linear(8, 10, bias=False), lambda: integers(2, 3, 5, 8)),
    "linear row": (lambda: nn.Linear(8, 12), lambda: integers(1, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_layer_prunes_its_data_gradient_and_nothing_else(name: str, function: str) -> None:
    make, data = LAYERS[name]
    model = integer_model(make()).train()
    x = data().requires_grad_()
    if function in ("random", "magnitude"):
        assert check(model, x, function=function, n=1, m=4) == 1
    dense = gradients(model, model, x)
    given = gradients(model, compiled(model, "1:4", grad_pruning=function), x)
    for key, right in dense.items():
        assert torch.equal(given[key], right) == (key != "input 0"), key


@pytest.mark.parametrize(("n", "m"), [(1, 2), (4, 8), (2, 8), (3, 5), (4, 32)])
def test_ratios_and_widths_that_do_not_fit(n: int, m: int) -> None:
    model = net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Conv2d(8, 22, 3), b=nn.Conv2d(22, 7, 1))
    assert check(model, image().requires_grad_(), n=n, m=m) == 2


def test_channels_last() -> None:
    model = net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Conv2d(8, 12, 3), b=nn.Conv2d(12, 8, 1))
    model = model.to(memory_format=torch.channels_last)
    x = image().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert check(model, x) == 2


def test_half_precision_weights() -> None:
    model = net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Conv2d(8, 12, 1), b=nn.Conv2d(12, 8, 1)).bfloat16()
    assert check(model, image().bfloat16().requires_grad_()) == 2


def test_autocast() -> None:
    model = net(lambda s, x: s.b(F.relu(s.a(x)).mean((2, 3))), a=nn.Conv2d(8, 16, 1), b=nn.Linear(16, 12))

    def run(ratio: str | None) -> dict[str, Any]:
        options = {**FORCED, "grad_sparsity": ratio}
        call = torch.compile(model, backend=fxprune.hwprune, options=options)
        with torch.autocast("cpu", torch.bfloat16), watched() as seen:
            found = gradients(model, call, image().requires_grad_())
        assert sum(seen.pruned) == (2 if ratio else 0)
        torch._dynamo.reset()
        return found

    dense, given = run(None), run("2:4")
    assert torch.equal(given["b.weight"], dense["b.weight"]) and torch.equal(given["b.bias"], dense["b.bias"])
    assert not torch.equal(given["a.weight"], dense["a.weight"])


def branches(self: Any, x: Tensor) -> Tensor:
    """A residual block whose gradient is read by three convolutions and an add."""
    y = F.relu(self.a(x))
    return self.c(torch.cat([self.b(y) + x, y], 1)) + self.skip(x)


def views(self: Any, x: Tensor) -> Tensor:
    """Tokens: permutes, splits and merges between linear layers."""
    y = self.a(x.flatten(2).transpose(1, 2))
    y = y.view(2, 6, 6, -1).permute(0, 3, 1, 2)
    return self.b(y).reshape(2, -1) @ self.weight


def attention(self: Any, x: Tensor) -> Tensor:
    """Products of activations are no layers."""
    q, k, v = self.qkv(x.flatten(2).transpose(1, 2)).chunk(3, -1)
    return self.out((q @ k.transpose(1, 2)).relu() @ v)


def shared(self: Any, x: Tensor) -> Tensor:
    return self.a(F.relu(self.a(F.relu(self.a(x)))))


def near_misses(self: Any, x: Tensor) -> Tensor:
    """Computed weights count; a detached input, a left factor and an elementwise product do not."""
    y = F.conv2d(x, self.a.weight * 2, None, 1, 1)
    y = y + self.b(x.detach()) + self.scale.view(1, -1, 1, 1) * x
    return torch.matmul(self.left, y)


class Double(torch.autograd.Function):
    """An operation of the user's own between two layers, with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 3


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "branches": (
        lambda: net(
            branches,
            a=nn.Conv2d(8, 8, 3, padding=1),
            b=nn.Conv2d(8, 8, 1),
            c=nn.Conv2d(16, 8, 3, padding=1),
            skip=nn.Conv2d(8, 8, 1),
        ),
        4,
    ),
    "views": (
        lambda: net(views, a=nn.Linear(8, 4), b=nn.Conv2d(4, 4, 3), weight=nn.Parameter(torch.zeros(64, 6))),
        3,
    ),
    "attention": (lambda: net(attention, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8)), 2),
    "shared": (lambda: net(shared, a=nn.Conv2d(8, 8, 3, padding=1)), 3),
    "near misses": (
        lambda: net(
            near_misses,
            a=nn.Conv2d(8, 8, 3),
            b=nn.Conv2d(8, 8, 1),
            scale=nn.Parameter(torch.zeros(8)),
            left=nn.Parameter(torch.zeros(6, 6)),
        ),
        1,
    ),
    "own function": (lambda: net(lambda s, x: s.b(Double.apply(s.a(x))), a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 1)), 2),
    "depthwise": (
        lambda: net(lambda s, x: s.b(s.a(x)), a=nn.Conv2d(8, 8, 3, groups=8), b=nn.Conv2d(8, 12, 1)),
        1,
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("function", ["magnitude", "random"])
def test_models_equal_the_oracle(name: str, function: str) -> None:
    make, layers = MODELS[name]
    if name == "near misses":  # a computed weight has no name for the oracle to draw by
        function = "magnitude"
    assert check(make(), image().requires_grad_(), function=function) == layers


def test_first_layers_stay_dense() -> None:
    model = net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 8, 1))
    assert check(model, image(3)) == 1  # the input needs no gradient
    torch._dynamo.reset()
    assert check(model, image(3).requires_grad_()) == 1  # three channels
    reasons = {row.name: row.reason for row in LAST_REPORTS[-1].gradients}
    assert reasons == {"a": "a first layer: 3 input channels", "b": None}


def test_layers_can_be_ignored() -> None:
    model = net(lambda s, x: s.b(F.relu(s.a(x))), a=nn.Conv2d(8, 8, 3), b=nn.Conv2d(8, 8, 1))
    dense = gradients(model, model, image().requires_grad_())
    with watched() as seen:
        given = gradients(model, compiled(model, ignored_layers=("b",)), image().requires_grad_())
    assert seen.pruned == [1]
    assert torch.equal(given["a.weight"], dense["a.weight"]) and not torch.equal(given["input 0"], dense["input 0"])


@pytest.mark.parametrize("target", ["dX", "dW", "both"])
@pytest.mark.parametrize("name", ["conv", "linear 3d", "linear", "one pixel", "grouped"])
def test_targets(name: str, target: str) -> None:
    make, data = LAYERS[name]
    model = integer_model(make()).train()
    x = data().requires_grad_()
    dense = gradients(model, model, x)
    given = gradients(model, compiled(model, "1:4", grad_target=target), x)
    assert torch.equal(given["bias"], dense["bias"])
    assert torch.equal(given["input 0"], dense["input 0"]) == (target == "dW")
    assert torch.equal(given["weight"], dense["weight"]) == (target == "dX")


def test_a_weight_gradient_is_pruned_along_what_it_adds_up() -> None:
    model = integer_model(nn.Linear(8, 12)).train()
    x, upstream = integers(8, 8), integers(8, 12, seed=5)
    given = gradients(model, compiled(model, "2:4", grad_target="dW"), x, upstream=upstream)
    pruned = torch.ops.fxprune.nm_prune(upstream.t().contiguous(), None, 2, 4, -1, 1, "magnitude", 0).t()
    assert torch.equal(given["weight"], pruned.t() @ x)


@pytest.mark.parametrize("target", ("dX", "dW"))
@pytest.mark.parametrize("sparse", (False, True))
def test_pruned_weights_and_pruned_gradients(sparse: bool, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that run our kernels in training have their data gradient pruned as well.

    sparse: gradients by the operators that a GPU runs.
    """
    monkeypatch.setattr(tile_gradients, "pays", lambda *_: sparse)
    make = lambda: net(  # noqa: E731
        lambda s, x: s.c(F.relu(s.b(F.relu(s.a(x)))).mean((2, 3)) * 16),
        a=nn.Conv2d(8, 16, 1),
        b=nn.Conv2d(16, 16, 3, padding=1),
        c=nn.Linear(16, 64),
    )
    x = integers(2, 8, 4, 4, seed=7).requires_grad_()
    model = fxprune.prune(make(), x, sparsity=0.5, columns=False, granularity=8).model.train()
    if target == "dX":
        assert check(model, x) == 3
    else:  # no layer that was rewritten is left out
        with watched() as seen:
            gradients(model, compiled(model, "2:4", grad_target="dW"), x)
        assert sum(ops[PRUNE] for ops in seen.operators) == sum(seen.pruned) == 3
    ran = LAST_REPORTS[-1].decisions
    assert all(d.chosen for d in ran) and len(ran) == 3


def test_in_place_activations() -> None:
    """dL/dO of a layer is what comes back through an activation that overwrites its result."""
    model = net(lambda s, x: s.b(F.relu(s.a(x), inplace=True)), a=nn.Conv2d(8, 8, 3), b=nn.Conv2d(8, 8, 1))
    assert check(model, image().requires_grad_()) == 2


parts = st.lists(
    st.tuples(
        st.sampled_from(
            (
                "conv",
                "pointwise",
                "grouped",
                "depthwise",
                "transposed",
                "linear",
                "residual",
                "twice",
                "cat",
                "pool",
                "detach",
            )
        ),
        st.sampled_from((4, 6, 8, 9)),
        st.booleans(),
    ),
    min_size=1,
    max_size=4,
)


class Random(nn.Module):
    """A chain of productions over one map; ``recipe`` rebuilds it."""

    def __init__(self, recipe: list[tuple[str, int, bool]]) -> None:
        super().__init__()
        self.kinds = [kind for kind, _, _ in recipe]
        self.parts = nn.ModuleList()
        channels = 8
        for kind, width, bias in recipe:
            groups = 2 if channels % 2 == 0 else 1
            made = {
                "conv": lambda c=channels, w=width, b=bias: nn.Conv2d(c, w, 3, padding=1, bias=b),
                "pointwise": lambda c=channels, w=width, b=bias: nn.Conv2d(c, w, 1, bias=b),
                "grouped": lambda c=channels, w=width, b=bias, g=groups: nn.Conv2d(c, g * w, 1, groups=g, bias=b),
                "depthwise": lambda c=channels, b=bias: nn.Conv2d(c, c, 3, padding=1, groups=c, bias=b),
                "transposed": lambda c=channels, w=width, b=bias: nn.ConvTranspose2d(c, w, 3, padding=1, bias=b),
                "linear": lambda c=channels, w=width, b=bias: nn.Linear(c, w, bias=b),
                "residual": lambda c=channels, b=bias: nn.Conv2d(c, c, 1, bias=b),
                "twice": lambda c=channels, b=bias: nn.Conv2d(c, c, 3, padding=1, bias=b),
                "cat": lambda c=channels, w=width, b=bias: nn.Conv2d(c, w, 1, bias=b),
            }.get(kind, nn.Identity)()
            self.parts.append(made)
            channels = {"cat": channels + width, "grouped": groups * width}.get(kind, channels)
            if kind in ("conv", "pointwise", "transposed", "linear"):
                channels = width

    def forward(self, x: Tensor) -> Tensor:
        for kind, part in zip(self.kinds, self.parts, strict=True):
            if kind == "linear":
                x = part(x.movedim(1, -1)).movedim(-1, 1)
            elif kind == "residual":
                x = x + part(x)
            elif kind == "twice":
                x = part(F.relu(part(x)))
            elif kind == "cat":
                x = torch.cat([x, part(x)], 1)
            elif kind == "pool":
                x = F.max_pool2d(x, 2, 1, 0)
            elif kind == "detach":
                x = x + F.relu(x.detach())
            else:
                x = F.relu(part(x))
        return x


@settings(max_examples=25)
@given(recipe=parts, function=st.sampled_from(("magnitude", "random")), last=st.booleans(), grad=st.booleans())
def test_random_networks(recipe: list[tuple[str, int, bool]], function: str, last: bool, grad: bool) -> None:
    """Integer data, so that exact functions compare bit for bit with any order of summation."""
    torch._dynamo.reset()
    gradient_clock.load_state_dict({"step": 0, "call": 0})
    model = Random(recipe)
    for i, parameter in enumerate(model.parameters()):
        parameter.data.copy_(integers(*parameter.shape, seed=i, low=-1, high=1))
    if not any(p.requires_grad for p in model.parameters()) and not grad:
        return
    x = integers(2, 8, 5, 5, seed=3, low=-2, high=2)
    if last:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    check(model.train(), x.requires_grad_(grad), function=function)
