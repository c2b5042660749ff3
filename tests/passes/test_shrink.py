"""Channels without effect are cut out of the graph: every structure, its negative twin, and weights that change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.graph import argument, aten, is_call
from tests.oracle import Run, assert_exact, assert_model, check, compiled, integer_model, integers, rewritten

X = integers(2, 8, 6, 6, seed=7)
DENSE: dict[str, Any] = {"min_speedup": 100.0}  # no kernel of ours: what is left is plain dense code


class Net(nn.Module):
    """Named layers and a body over them; values stay small integers through ReLU6."""

    def __init__(self, body: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.body = body
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def net(body: Callable[[Any, Tensor], Any], **layers: nn.Module) -> Any:
    return integer_model(Net(body, **layers))


@torch.no_grad()
def silent(layer: Any, norm: Any = None, start: int = 0, count: int = 8) -> None:
    """Zero filters ``start`` to ``start + count`` with their bias and BatchNorm, as soft masks do."""
    dead = slice(start, start + count)
    layer.weight[dead] = 0
    if layer.bias is not None:
        layer.bias[dead] = 0
    if norm is not None:
        norm.weight[dead], norm.bias[dead] = 0, 0


@torch.no_grad()
def unread(layer: Any, start: int = 0, count: int = 8) -> None:
    """Zero the columns of input features."""
    layer.weight[:, start : start + count] = 0


def is_conv(node: Any) -> bool:
    return is_call(node, aten.conv2d.default)


def cut(run: Run) -> list[tuple[str, int, int]]:
    return [(s.layers[0], s.before, s.after) for s in run.context.shrunk]


def pair(between: Callable[[Any, Tensor], Any] = lambda m, y: F.relu6(y), **layers: nn.Module) -> Any:
    """Two 3x3 convolutions with 24 channels between them, and something in the middle."""
    first, second = nn.Conv2d(8, 24, 3, padding=1), nn.Conv2d(24, 16, 3)
    return net(lambda m, x: m.second(between(m, m.first(x))), first=first, second=second, **layers)


def test_silent_filters_go_with_their_columns() -> None:
    model = pair(lambda m, y: F.relu6(m.norm(y)), norm=nn.BatchNorm2d(24))
    silent(model.first, model.norm, 3)
    run = check(model, X, **DENSE)
    assert cut(run) == [("first", 24, 16)] and run.changed
    weights = [tuple(run.context.weights.value(argument(n, "weight")).shape) for n in run.graph.graph.nodes if is_conv(n)]
    assert weights == [(16, 8, 3, 3), (16, 16, 3, 3)]


def test_unread_filters_go_whatever_they_compute() -> None:
    model = pair(lambda m, y: torch.sigmoid(y + 3) + F.relu6(y + 2))
    unread(model.second, 5)
    assert cut(check(model, X, **DENSE)) == [("first", 24, 16)]


# what stands between a filter that is zero and its readers, and whether the filter may go
BETWEEN: dict[str, tuple[Callable[[Any, Tensor], Any], bool]] = {
    "relu6": (lambda m, y: F.relu6(y), True),
    "in place": (lambda m, y: F.relu6(y, inplace=True), True),
    "leaky": (lambda m, y: F.leaky_relu(y, 0.5), True),
    "hardtanh around zero": (lambda m, y: F.hardtanh(y, -2.0, 2.0), True),
    "hardtanh above zero": (lambda m, y: F.hardtanh(y, 1.0, 3.0), False),
    "sigmoid of zero": (lambda m, y: torch.sigmoid(y), False),
    "plus a number": (lambda m, y: F.relu6(y) + 1, False),
    "times a number": (lambda m, y: F.relu6(y) * 2, True),
    "max pooling": (lambda m, y: F.max_pool2d(F.relu6(y), 2, 1), True),
    "average pooling": (lambda m, y: F.avg_pool2d(F.relu6(y), 2, 1), True),
    "gated": (lambda m, y: F.relu6(y) * torch.sigmoid(m.gate(y.mean((2, 3), keepdim=True))), True),
    "sum with a live branch": (lambda m, y: F.relu6(y + m.other(X[: len(y)])), False),
    "times a live branch": (lambda m, y: F.relu6(y * m.other(X[: len(y)])), True),
    "depthwise": (lambda m, y: m.depth(F.relu6(y)), True),
    "depthwise with a bias": (lambda m, y: m.biased(F.relu6(y)), False),
    "grouped": (lambda m, y: m.grouped(F.relu6(y)), False),
    "one map for all channels": (lambda m, y: F.relu6(y) * m.attention(y).relu(), False),
    "scale per channel": (lambda m, y: F.relu6(y) * m.scale, True),
    "shift per channel": (lambda m, y: F.relu6(y) + m.scale, False),
    "norm with a shift": (lambda m, y: m.shifted(F.relu6(y)), False),
    "norm over channels": (lambda m, y: F.layer_norm(y.permute(0, 2, 3, 1), (24,)).permute(0, 3, 1, 2), False),
    "permuted twice": (lambda m, y: F.relu6(y).permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2), True),
    "view": (lambda m, y: F.relu6(y).view(-1, 24, 6, 6), False),
    "softmax": (lambda m, y: y.softmax(1), False),
    "mean over channels": (lambda m, y: F.relu6(y) + y.mean(1, keepdim=True), False),
    "concatenation": (lambda m, y: torch.cat([y[:, :12], y[:, 12:]], 1), False),
    "mutation of a value with two readers": (lambda m, y: (y.add_(1), y * 2)[1], False),
    "size of the batch": (lambda m, y: F.relu6(y) * y.size(0), True),
}


def surrounded(name: str) -> Any:
    model = pair(
        BETWEEN[name][0],
        gate=nn.Conv2d(24, 24, 1),
        other=nn.Conv2d(8, 24, 3, padding=1),
        depth=nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False),
        biased=nn.Conv2d(24, 24, 3, padding=1, groups=24),
        grouped=nn.Conv2d(24, 24, 3, padding=1, groups=2),
        attention=nn.Conv2d(24, 1, 1),
        shifted=nn.BatchNorm2d(24),
    )
    model.register_buffer("scale", integers(24, 1, 1, low=1, high=3))
    with torch.no_grad():
        model.biased.bias.copy_(integers(24, low=1, high=2))
        model.shifted.bias.fill_(1.0)
        model.second.weight.copy_(integers(*model.second.weight.shape, low=1, high=2))
    return model


@pytest.mark.parametrize("name", BETWEEN)
def test_zeros_are_followed_and_never_invented(name: str) -> None:
    model = surrounded(name)
    silent(model.first, start=11)
    assert cut(check(model, X, **DENSE)) == ([("first", 24, 16)] if BETWEEN[name][1] else [])


@pytest.mark.parametrize("name", ["sigmoid of zero", "plus a number", "depthwise with a bias", "sum with a live branch"])
def test_a_constant_that_nobody_reads_goes(name: str) -> None:
    model = surrounded(name)
    unread(model.second, start=2)
    assert [(before, after) for _, before, after in cut(check(model, X, **DENSE))] == [(24, 16)]


def test_a_filter_that_is_its_bias_stays() -> None:
    model = pair()
    silent(model.first)
    model.first.bias.data[:8] = 2
    run = check(model, X, **DENSE)
    assert not run.changed and cut(run) == []


def test_dead_taps_of_a_depthwise_convolution_end_a_channel() -> None:
    model = surrounded("depthwise")
    silent(model.depth, start=4)
    assert cut(check(model, X, **DENSE)) == [("first", 24, 16)]


def test_dead_in_one_reader_only_stays() -> None:
    body = lambda m, x: m.a(y := F.relu6(m.first(x))) + m.b(y)  # noqa: E731
    model = net(body, first=nn.Conv2d(8, 24, 1), a=nn.Conv2d(24, 16, 1), b=nn.Conv2d(24, 16, 3, padding=1))
    unread(model.a)
    assert cut(check(model, X, **DENSE)) == []
    unread(model.b)
    assert cut(check(model, X, **DENSE)) == [("first", 24, 16)]


def test_both_branches_of_an_add() -> None:
    body = lambda m, x: m.last(F.relu6(m.a(x) + m.b(x)))  # noqa: E731
    model = net(body, a=nn.Conv2d(8, 24, 1), b=nn.Conv2d(8, 24, 3, padding=1), last=nn.Conv2d(24, 8, 1))
    silent(model.a, start=2)
    assert cut(check(model, X, **DENSE)) == []
    silent(model.b, start=2)
    assert cut(check(model, X, **DENSE)) == [("a", 24, 16)]


@pytest.mark.parametrize("dead, left", [(5, None), (7, None), (8, 16), (10, 16), (16, 8), (23, 8), (24, 8)])
def test_a_multiple_of_eight_stays(dead: int, left: int | None) -> None:
    model = pair()
    silent(model.first, count=dead)
    if dead == 24:
        model.second.bias.data.copy_(integers(16, low=-3, high=9))
    assert cut(check(model, X, **DENSE)) == ([] if left is None else [("first", 24, left)])


def test_what_only_a_dead_filter_reads_is_dead() -> None:
    layers = {"a": nn.Conv2d(8, 24, 1), "b": nn.Conv2d(24, 24, 3), "c": nn.Conv2d(24, 8, 1)}
    model = net(lambda m, x: m.c(F.relu6(m.b(F.relu6(m.a(x) + 1)))), **layers)
    with torch.no_grad():
        model.b.weight[8:, :8] = 0  # channels 0 to 7 of a are read by filters 0 to 7 of b only
    unread(model.c)
    assert cut(check(model, X, **DENSE)) == [("a", 24, 16), ("b", 24, 16)]


def test_flatten_into_a_linear_layer() -> None:
    layers = {"conv": nn.Conv2d(8, 24, 3), "fc": nn.Linear(24 * 16, 32), "out": nn.Linear(32, 12)}
    model = net(lambda m, x: m.out(F.relu6(m.fc(F.relu6(m.conv(x)).flatten(1)))), **layers)
    silent(model.conv, start=9)
    silent(model.fc, count=16)
    run = check(model, X, **DENSE)
    assert cut(run) == [("conv", 24, 16), ("fc", 32, 16)]


def test_channels_last_linear_layers_and_transposed_weights() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        y = F.relu6(m.up(x.permute(0, 2, 3, 1)))
        return m.conv(m.down(y).permute(0, 3, 1, 2)) + torch.matmul(y, m.back).permute(0, 3, 1, 2)

    model = net(body, up=nn.Linear(8, 24), down=nn.Linear(24, 16), conv=nn.Conv2d(16, 8, 1))
    model.back = nn.Parameter(integers(24, 8, seed=3))
    silent(model.up)
    silent(model.down)
    assert cut(check(model, X, **DENSE)) == [("up", 24, 16), ("down", 16, 8)]


def test_addmm_of_a_hidden_layer() -> None:
    model = net(lambda m, x: torch.addmm(m.bias, F.relu6(torch.addmm(m.shift, x, m.up)), m.down))
    for name, shape in {"up": (8, 24), "shift": (24,), "down": (24, 8), "bias": (8,)}.items():
        model.register_parameter(name, nn.Parameter(integers(*shape, seed=len(name))))
    with torch.no_grad():
        model.up[:, 3:11], model.shift[3:11] = 0, 0
    assert [(b, a) for _, b, a in cut(check(model, integers(5, 8), **DENSE))] == [(24, 16)]


def returned(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = F.relu6(m.first(x))
    return m.second(y), y


OUTSIDE: dict[str, Callable[[Any, Tensor], Any]] = {
    "output": returned,
    "graph break": lambda m, x: m.second((F.relu6(m.first(x)), torch._dynamo.graph_break())[0]),
    "training norm": lambda m, x: m.second(F.batch_norm(m.first(x), None, None, training=True)),
    "computed weight": lambda m, x: F.conv2d(F.relu6(m.first(x)), m.second.weight * x.amax()),
}


@pytest.mark.parametrize("name", [n for n in OUTSIDE if n != "graph break"])
def test_channels_that_others_see_stay(name: str) -> None:
    model = net(OUTSIDE[name], first=nn.Conv2d(8, 24, 1), second=nn.Conv2d(24, 16, 1))
    silent(model.first)
    assert cut(check(model, X, **DENSE)) == []


def test_a_graph_break_is_an_output() -> None:
    model = net(OUTSIDE["graph break"], first=nn.Conv2d(8, 24, 1), second=nn.Conv2d(24, 16, 1))
    silent(model.first)
    fast = compiled(model)
    with torch.no_grad():
        assert_exact(fast.call(X), model(X))
    assert all(not c.shrunk for c in fast.contexts)


def test_a_weight_used_twice_is_cut_for_each_use() -> None:
    body = lambda m, x: m.last(F.relu6(m.first(x))) + m.last(F.relu6(m.other(x)))  # noqa: E731
    model = net(body, first=nn.Conv2d(8, 24, 1), other=nn.Conv2d(8, 24, 1), last=nn.Conv2d(24, 8, 1))
    silent(model.first, start=8)
    assert cut(check(model, X, **DENSE)) == [("first", 24, 16)]


def test_not_a_number_is_no_zero() -> None:
    model = pair()
    silent(model.first)
    model.first.weight.data[0, 0, 0, 0] = torch.nan
    assert cut(rewritten(model, X, **DENSE)) == []
    silent(model.first)
    model.first.weight.data[:8] = -0.0
    assert cut(check(model, X, **DENSE)) == [("first", 24, 16)]


def test_our_kernels_run_what_is_left() -> None:
    body = lambda m, x: m.project(F.relu6(m.depth(F.relu6(m.expand(x)))))  # noqa: E731
    depth = nn.Conv2d(24, 24, 3, padding=1, groups=24)
    model = net(body, expand=nn.Conv2d(8, 24, 1), depth=depth, project=nn.Conv2d(24, 16, 1))
    silent(model.expand)
    silent(model.depth, start=0)
    model.depth.weight.data[8:, :, 0] = 0
    run = check(model, X)
    assert cut(run) == [("expand", 24, 16)] and run.ops["depthwise_taps"] == 1 and run.ops["tile_gemm"] == 2


def test_batches_of_every_size() -> None:
    model = pair(lambda m, y: F.relu6(m.norm(y)), norm=nn.BatchNorm2d(24))
    silent(model.first, model.norm)
    fast = compiled(model, dynamic=True, **DENSE)
    with torch.no_grad():
        for batch in (2, 5, 3):
            x = integers(batch, 8, 6, 6, seed=batch)
            assert_exact(fast.call(x), model(x))
        assert len(fast.contexts) == 1
        assert_exact(fast.call(X[:1]), model(X[:1]))
    assert all(cut_of(c) == [(24, 16)] for c in fast.contexts)


def cut_of(context: Any) -> list[tuple[int, int]]:
    return [(s.before, s.after) for s in context.shrunk]


def test_weights_that_change_after_compile() -> None:
    model = pair(lambda m, y: F.relu6(m.norm(y)), norm=nn.BatchNorm2d(24))
    silent(model.first, model.norm, start=4)
    fast = compiled(model, **DENSE)
    with torch.no_grad():
        assert_model(fast.call(X), model, (X,))
        (graph,) = fast.graphs
        first = graph.context
        for tensor in (model.first.weight, model.second.weight, model.norm.bias, model.second.bias):  # new values
            tensor[13:16] = integers(*tensor[13:16].shape, seed=21, low=1, high=3)
            assert_model(fast.call(X), model, (X,))
        assert graph.context is first
        model.norm.weight[5] = 2  # the filter itself is still zero: the shift is mean times scale
        model.norm.running_mean[5] = 1
        assert_model(fast.call(X), model, (X,))
        model.first.weight[6] = 1
        model.norm.weight[6] = 1
        assert_model(fast.call(X), model, (X,))
        assert graph.context is not first
        model.second.weight[:, 4:12] = 0
        model.norm.bias[4:12] = 3
        assert_model(fast.call(X), model, (X,))


def test_gradients_are_those_of_the_whole_model() -> None:
    model = pair()
    silent(model.first)
    fast = compiled(model, **DENSE)
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(fast.call(x).sum(), [model.first.weight])
    (expected,) = torch.autograd.grad(model(x).sum(), [model.first.weight])
    assert_exact(gradient, expected, trusted=False)
    assert not fast.contexts


@pytest.mark.parametrize("options", [{}, {"freeze": True}])
def test_inductor_runs_the_smaller_graph(options: dict[str, Any]) -> None:
    model = pair(lambda m, y: F.relu6(m.norm(y)), norm=nn.BatchNorm2d(24))
    silent(model.first, model.norm)
    fast = compiled(model, **{**DENSE, "fallback": "inductor", **options})
    with torch.no_grad():
        assert_model(fast.call(X), model, (X,))
    assert [cut_of(c) for c in fast.contexts] == [[(24, 16)]]


def tiled(dead: slice) -> nn.Sequential:
    """1x1, depthwise, 1x1 with a quarter of the K rows per tile of 8; the depthwise filters of ``dead`` have no taps."""
    layers = (nn.Conv2d(32, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=64), nn.Conv2d(64, 16, 1))
    model = integer_model(nn.Sequential(*layers))
    with torch.no_grad():
        for tile in range(8):
            rows = torch.arange(32) % 4 != tile % 4
            model[0].weight[8 * tile : 8 * tile + 8, rows] = 0
        for layer in model[:2]:
            layer.bias.zero_()
        model[1].weight[dead] = 0
    return model


@pytest.mark.parametrize(
    ("dead", "left"),
    [
        (slice(5, 61, 8), 64),  # one of each tile: the others would share tiles of other rows
        (slice(16, 24), 56),  # a whole tile
    ],
)
def test_channels_leave_tiles_as_they_are(dead: slice, left: int) -> None:
    run = check(tiled(dead), integers(2, 32, 6, 6))
    assert [s.after for s in run.context.shrunk] == ([left] if left < 64 else [])
    (expand,) = [d for d in run.context.decisions if d.match.name == "0"]
    assert expand.mask is not None and expand.mask.tiling.granularity == 8 and expand.sparsity == 0.75


def test_channels_of_a_dense_weight_leave_one_by_one() -> None:
    model = tiled(slice(5, 61, 7))
    with torch.no_grad():
        model[0].weight.fill_(1)
    run = check(model, integers(2, 32, 6, 6))
    assert [s.after for s in run.context.shrunk] == [56]


def test_complex_channels_go_too() -> None:
    """No kernel is of complex numbers; cutting is dense code."""
    torch.manual_seed(0)
    layers = {name: nn.Linear(*sizes, dtype=torch.complex64) for name, sizes in {"a": (12, 24), "b": (24, 8)}.items()}
    model = Net(lambda m, x: m.b(m.a(x)), **layers).eval()
    silent(model.a, start=8, count=16)
    x = torch.randn(5, 12, dtype=torch.complex64)
    run = rewritten(model, x, exact=())
    assert cut(run) == [("a", 24, 8)] and run.changed
    torch.testing.assert_close(run.output, run.expected)
