"""Models in bfloat16, and models under autocast: sparse kernels, the error of dense bfloat16, live weights, training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune import backend
from fxprune.decisions import LAST_REPORTS
from tests.oracle import FORCED, assert_exact, compiled, integer_model, integers, operators, rewritten, widened, zero_some
from tests.toys import image, mlp, mobile, pruned, rows, run

MODES = ("bfloat16", "float BatchNorm", "autocast")


class Inverted(nn.Module):
    """Expand, depthwise, squeeze-and-excite gate, project, residual: every step a region knows, with BatchNorms to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.bn1 = nn.Conv2d(16, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.dw, self.bn2 = nn.Conv2d(64, 64, 5, padding=2, groups=64, bias=False), nn.BatchNorm2d(64)
        self.squeeze, self.excite = nn.Conv2d(64, 8, 1), nn.Conv2d(8, 64, 1)
        self.project, self.bn3 = nn.Conv2d(64, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.bn2(self.dw(F.relu6(self.bn1(self.expand(x))))))
        y = y * torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.head((self.bn3(self.project(y)) + x).mean((2, 3)))


class Feed(nn.Module):
    """A channels-last chain with LayerNorm between permutes, which may run feature-major."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2)


class Encoder(nn.Module):
    """Linears with GELU, a residual and LayerNorm, rows of several images."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(96, 200), nn.Linear(200, 96), nn.LayerNorm(96)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(F.gelu(self.up(x))) + x)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "inverted": (Inverted, (3, 16, 9, 9)),
    "feed": (Feed, (2, 32, 7, 7)),
    "encoder": (Encoder, (2, 19, 96)),
}


@contextmanager
def mode_of(mode: str) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"), torch.no_grad():
        yield


def model_in(mode: str, name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model with zeros, its input and the fp64 result of the weights it holds."""
    torch.manual_seed(1)
    make, shape = CASES[name]
    model, x = zero_some(make().eval()), torch.randn(shape)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    if mode != "autocast":
        model, x = model.bfloat16(), x.bfloat16()
    if mode == "float BatchNorm":
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.float()
    with torch.no_grad():
        return model, x, copy.deepcopy(model).double()(x.double())


def rmse(given: Tensor, exact: Tensor) -> float:
    return (given.double() - exact).square().mean().sqrt().item()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_models_run_sparse_with_the_error_of_dense_bfloat16(mode: str, name: str) -> None:
    if mode == "float BatchNorm" and name != "inverted":
        pytest.skip("there is no BatchNorm")
    model, x, exact = model_in(mode, name)
    fast = compiled(model)
    with mode_of(mode):
        dense, given = model(x), fast.call(x)
    assert given.dtype == dense.dtype and given.shape == dense.shape
    assert rmse(given, exact) <= 1.25 * rmse(dense, exact), f"{rmse(given, exact)} beside {rmse(dense, exact)}"
    (context,) = fast.contexts
    assert context.decisions and all(d.chosen for d in context.decisions)
    if name == "inverted":
        assert context.counts["fold_batchnorm"] == 3 and context.counts["fuse_gate"] == 1
        assert context.counts["form_regions"] == 1 and context.counts["fuse_epilogue"] >= 4
    elif mode == "bfloat16":
        assert context.counts["fuse_epilogue"] >= 1
        assert (context.counts["fuse_transpose"] == 2) == (name == "feed")


def test_float32_stays_as_it_was() -> None:
    """The bits of a float32 model do not depend on what is there for bfloat16."""
    model, x, _ = model_in("autocast", "inverted")
    outputs, before = [], torch.ops.fxprune.isa()
    try:
        for isa in {before, "avx512" if before in ("amx", "avx512_bf16") else before}:
            torch.ops.fxprune.set_isa(isa)
            outputs.append(run(compiled(model).call, x))
    finally:
        torch.ops.fxprune.set_isa(before)
    assert all(torch.equal(outputs[0], y) for y in outputs)


def test_packed_weights_are_an_image_and_the_bias_is_not_rounded() -> None:
    for mode in ("bfloat16", "autocast"):
        model, x, _ = model_in(mode, "inverted")
        with mode_of(mode):
            result = rewritten(model, x, exact=())
        types = {}
        for node in result.graph.graph.nodes:
            if node.op == "placeholder" and node.users:
                value = node.meta["example_value"]
                types[node.name.rpartition("_")[2] if "values" in node.name else node.name] = (value.dtype, value.dim())
        values = [t for name, t in types.items() if name == "values"]
        assert values and set(values) == {(torch.bfloat16, 2)}
        shifts = [t for name, t in types.items() if "float" in name]
        assert mode == "autocast" or (len(shifts) == 3 and set(shifts) == {(torch.float32, 1)})
        assert operators(result.graph)["tile_gemm"] == 5


@pytest.mark.parametrize("mode", ("bfloat16", "autocast"))
@pytest.mark.parametrize("change", ("values", "support", "statistics"))
def test_a_weight_that_changes_is_packed_again(mode: str, change: str) -> None:
    model = pruned(mobile(), image())
    x = image()
    if mode == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    fast = compiled(model)
    with mode_of(mode):
        assert_exact(fast.call(x), model(x), "first call")
    with torch.no_grad():
        if change == "values":
            model.fc.weight.mul_(2)
        elif change == "support":
            model.fc.weight.fill_(1)
        else:
            model.bn1.running_mean.add_(1)
    with mode_of(mode):  # anew, because autocast keeps the weights it cast
        assert_exact(fast.call(x), model(x), change)


@pytest.mark.parametrize("sparsity", [{"linear": 0.5, "pointwise": 0.5, "depthwise": 0.5}])
def test_a_bfloat16_model_is_pruned_and_explained(sparsity: Any) -> None:
    model, x = mobile().bfloat16(), image().bfloat16()
    result = fxprune.prune(model, x, sparsity=sparsity)
    assert result.model.fc.weight.dtype == torch.bfloat16
    assert (result.model.pw.weight == 0).float().mean() > 0.4
    table = fxprune.explain(result.model, x, autotune="off", min_speedup=0.0)
    assert len(table.rows) == 3 and not any("needs" in row[-1] for row in table.rows)
    with torch.no_grad():
        assert_exact(compiled(result.model).call(x), result.model(x))


def test_training_in_bfloat16_has_the_masked_models_gradients() -> None:
    model, x = pruned(mlp(), rows()).bfloat16(), rows().bfloat16()
    twin = copy.deepcopy(model)
    fast = compiled(model)
    for call in (fast.call, twin):
        call(x).float().sum().backward()
    for (name, a), b in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        mask = b[1].detach() != 0 if "weight" in name else torch.ones_like(b[1], dtype=torch.bool)
        assert_exact(a.grad[mask], b[1].grad[mask], name, trusted=False)
    assert all(d.chosen for d in LAST_REPORTS[-1].decisions)


@pytest.mark.parametrize("mode", ("bfloat16", "autocast"))
@pytest.mark.parametrize("freeze", (False, True))
def test_through_inductor_and_measured(mode: str, freeze: bool) -> None:
    model, x, exact = model_in(mode, "inverted")
    options = {"min_speedup": 0.01, "autotune": "fast", "freeze": freeze, "verify": True}
    fast = torch.compile(model, backend="hwprune", options=options)
    with mode_of(mode):
        dense, given = model(x), fast(x)
    assert rmse(given, exact) <= 1.25 * rmse(dense, exact)
    decisions = LAST_REPORTS[-1].decisions
    assert all(d.timing.measured for d in decisions if d.timing) and any(d.chosen for d in decisions)
    torch._dynamo.reset()


def test_timings_are_kept_by_dtype() -> None:
    measure = backend.Measure(fxprune.Config(**FORCED), backend.KernelTables().unit)
    keys = set()
    for mode in ("autocast", "bfloat16"):  # captured outside autocast, the first is float32
        model, x, _ = model_in(mode, "encoder")
        with torch.no_grad():
            context = rewritten(model, x, exact=widened(x)).context
        keys.add(measure._key(context.matches[0], context.decisions[0].mask))
    assert len(keys) == 2


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {  # of x (7, 48), a weight (48, 64) and a bias
    "matmul": lambda x, w, b: x @ w + b,
    "mm": lambda x, w, b: torch.mm(x, w),
    "addmm": lambda x, w, b: torch.addmm(b, x, w),
    "addmm with factors": lambda x, w, b: torch.addmm(b, x, w, beta=2, alpha=3),
    "linear of a transpose": lambda x, w, b: F.linear(x, w.t(), b),
    "matmul by a transpose": lambda x, w, b: (x @ w) @ w.T,
    "einsum": lambda x, w, b: torch.einsum("bi,io->bo", x, w),
    "bmm": lambda x, w, b: torch.bmm(x[None], w[None]),
    "baddbmm": lambda x, w, b: torch.baddbmm(b, x[None], w[None]),
}


class Form(nn.Module):
    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.form, self.weight, self.bias = form, nn.Parameter(torch.zeros(48, 64)), nn.Parameter(torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x, self.weight, self.bias)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_every_product_runs_sparse_under_autocast(name: str, dtype: torch.dtype) -> None:
    """What an earlier layer gives is bfloat16 already."""
    model, x = zero_some(integer_model(Form(FORMS[name]))), integers(7, 48, low=-2, high=2).to(dtype)
    fast = compiled(model)
    with mode_of("autocast"):
        expected, given = model(x), fast.call(x)
    assert given.dtype == expected.dtype
    assert_exact(given, expected, name, most_zeros=0.8)
    assert all(d.chosen for d in fast.contexts[0].decisions) and fast.contexts[0].decisions
