"""What training is asked for and cannot do: an error that names the remedy, or a documented behaviour; docs/training.md.

Nothing here may change the user's model, and what stays dense must train as in eager.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import fxprune
from fxprune.errors import ConfigError, NoGradientPruned, NothingToPrune, UnknownPattern, WrongOptimizer
from tests.oracle import FORCED, integer_model, integers
from tests.sdgp import Oracle, gradients, watched

MATCHES = "option 'grad_sparsity' got {}; expected \"n:m\" with 1 <= n <= m <= 32"


@pytest.fixture(autouse=True)
def fresh_compiles() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Tripled(torch.autograd.Function):
    """x, with a gradient that is not that of x: what it computes is seen in every gradient behind it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad


class Between(nn.Module):
    """Two linear layers with a call between them."""

    def __init__(self, call: Callable[[Tensor], Tensor] = Tripled.apply, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.a, self.b, self.call = nn.Linear(8, 8, dtype=dtype), nn.Linear(8, 12), call

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.call(self.a(x.to(self.a.weight.dtype))))


def mlp() -> nn.Module:
    return integer_model(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12))).train()


def rows() -> Tensor:
    return integers(4, 8, seed=1).requires_grad_()


def compiled(model: nn.Module, ratio: str = "2:4") -> Any:
    return torch.compile(model, backend=fxprune.hwprune, options={**FORCED, "grad_sparsity": ratio})


def penalty(model: nn.Module) -> None:
    """The gradient of a function of a gradient."""
    x = rows()
    (grad,) = torch.autograd.grad(compiled(model)(x).square().sum(), x, create_graph=True)
    grad.square().sum().backward()


def pruner(model: nn.Module, **arguments: Any) -> fxprune.Pruner:
    return fxprune.Pruner(model, rows(), **arguments)


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "n > m": (lambda m: compiled(m, "3:2")(rows()), BackendCompilerFailed, MATCHES.format("'3:2'")),
    "m > 32": (lambda m: compiled(m, "2:33")(rows()), BackendCompilerFailed, MATCHES.format("'2:33'")),
    "n is zero": (lambda m: compiled(m, "0:4")(rows()), BackendCompilerFailed, MATCHES.format("'0:4'")),
    "m is zero": (lambda m: compiled(m, "2:0")(rows()), BackendCompilerFailed, MATCHES.format("'2:0'")),
    "n is negative": (lambda m: compiled(m, "-2:4")(rows()), BackendCompilerFailed, MATCHES.format("'-2:4'")),
    "m is negative": (lambda m: compiled(m, "2:-4")(rows()), BackendCompilerFailed, MATCHES.format("'2:-4'")),
    "auto with n > m": (lambda m: compiled(m, "auto:3:2")(rows()), BackendCompilerFailed, MATCHES.format("'auto:3:2'")),
    "double backward": (lambda m: penalty(m), RuntimeError, "does not currently support double backward"),
    "weights, n > m": (lambda m: pruner(m, pattern="3:2"), UnknownPattern, r"'3:2' \(n:m has 1 <= n <= m <= 32\)"),
    "weights, m > 32": (lambda m: pruner(m, pattern="2:33"), UnknownPattern, r"n:m has 1 <= n <= m <= 32"),
    "weights, n is zero": (lambda m: pruner(m, pattern="0:4"), UnknownPattern, r"n:m has 1 <= n <= m <= 32"),
    "weights, n is negative": (lambda m: pruner(m, pattern="-1:4"), UnknownPattern, r"n:m has 1 <= n <= m <= 32"),
    "weights, sparsity below zero": (lambda m: pruner(m, sparsity=-0.5), ConfigError, "0 <= sparsity < 1"),
    "weights, sparsity zero": (lambda m: pruner(m, sparsity=0.0), NothingToPrune, "asks nothing of the 2 prunable"),
    "weights, no layer": (lambda m: pruner(nn.LayerNorm(8), sparsity=0.5), NothingToPrune, "Supported kinds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_the_model_is_as_it_was(name: str) -> None:
    call, error, message = REFUSED[name]
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        call(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(fxprune.plan.lookup(p) is None for p in model.parameters())


def test_a_graph_for_inference_is_as_without_the_option() -> None:
    model, x = mlp(), rows()
    for mode in (torch.no_grad, torch.inference_mode):
        with warnings.catch_warnings(), mode(), watched() as seen:
            warnings.simplefilter("error")
            assert torch.equal(compiled(model)(x), model(x))
        assert not seen.pruned
    with warnings.catch_warnings(), watched() as seen:
        warnings.simplefilter("error")
        frozen = mlp().requires_grad_(False)
        assert torch.equal(compiled(frozen)(x.detach()), frozen(x))
    assert not seen.pruned


@pytest.mark.parametrize("ratio", ["4:4", "1:1", "32:32", "auto:4:4", "off"])
def test_all_m_of_m_are_dense_without_a_warning(ratio: str) -> None:
    model, x = mlp(), rows()
    with warnings.catch_warnings(), watched() as seen:
        warnings.simplefilter("error")
        given = gradients(model, compiled(model, ratio), x)
    assert not sum(seen.pruned)
    for name, right in gradients(model, model, x).items():
        assert torch.equal(given[name], right), name


@pytest.mark.parametrize("pattern", ["4:4", "1:1", "32:32", {"linear": "4:4"}])
def test_weights_of_n_of_n_are_dense_without_a_warning(pattern: Any) -> None:
    model, x = mlp(), rows()
    before = copy.deepcopy(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        once = fxprune.prune(model, x, pattern=pattern)
        gradual = pruner(model, pattern=pattern)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
            assert not gradual.step()
        end = gradual.finalize()
    for result in (once, end):
        assert not len(result.plan) and not result.plan.weights and not any(result.sparsity.values())
        assert all(torch.equal(v, before[k]) for k, v in result.model.state_dict().items())
    with pytest.raises(ConfigError, match="all that pattern '4:4' can leave"):
        fxprune.prune(model, x, pattern="4:4", sparsity=0.5)


def test_one_kind_of_n_of_n_leaves_the_others_pruned() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(64, 8))
    result = fxprune.prune(model, torch.zeros(1, 8, 4, 4), pattern={"conv": "2:4", "linear": "4:4"})
    assert [layer.name for layer in result.plan] == ["0"] and bool((result.model[2].weight != 0).all())


def test_an_exported_program_is_as_without_the_option(tmp_path: Any) -> None:
    model, x = mlp().eval(), rows().detach()
    written = fxprune.export(model, (x,), tmp_path / "model.pt2", grad_sparsity="2:4", **FORCED)
    assert torch.equal(fxprune.load(written.path)(x), model(x))


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (nn.LayerNorm(8), rows(), "it holds no layer"),
        (nn.Linear(8, 12), rows().detach(), "its input needs no gradient"),
        (nn.Conv2d(3, 8, 3), integers(2, 3, 5, 5).requires_grad_(), "a first layer: 3 input channels"),
        (nn.Conv2d(8, 8, 3, groups=8), integers(2, 8, 5, 5).requires_grad_(), "depthwise"),
    ],
    ids=["no layer", "no gradient", "image", "depthwise"],
)
def test_a_model_without_an_eligible_layer_warns_and_trains_dense(model: nn.Module, x: Tensor, reason: str) -> None:
    model = integer_model(model).train()
    with pytest.warns(NoGradientPruned, match=reason):
        given = gradients(model, compiled(model), x)
    for name, right in gradients(model, model, x).items():
        torch.testing.assert_close(given[name], right)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's own look
@pytest.mark.parametrize("breaks", [False, True], ids=["one graph", "graph break"])
def test_layers_around_an_autograd_function_are_pruned(breaks: bool) -> None:
    model = integer_model(Between(torch._dynamo.disable(Tripled.apply) if breaks else Tripled.apply)).train()
    with watched() as seen:
        given = gradients(model, compiled(model), rows())
    assert seen.pruned == ([1, 1] if breaks else [2])
    with Oracle(model):
        expected = gradients(model, model, rows())
    dense = gradients(model, model, rows())
    assert all(torch.equal(given[name], expected[name]) for name in expected)
    assert not torch.equal(given["a.weight"], dense["a.weight"])


def test_a_complex_layer_stays_dense_beside_a_real_one() -> None:
    model = integer_model(Between(torch.real, torch.complex64)).train()
    with warnings.catch_warnings(), watched() as seen:
        warnings.filterwarnings("ignore", message=".*complex.*")
        given = gradients(model, compiled(model), rows())
    assert seen.pruned == [1]
    rows_of = {row["layer"]: row["reason"] for row in fxprune.gradient_report().to_dict()["rows"]}
    assert "complex64" in rows_of["a"] and rows_of["b"] == ""
    assert torch.equal(given["b.weight"], gradients(model, model, rows())["b.weight"])


def test_complex_weights_are_pruned_by_their_modulus() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 64, dtype=torch.complex64)
    before = model.weight.detach().abs()
    x = torch.randn(4, 8, dtype=torch.complex64)
    made = fxprune.Pruner(model, x, sparsity=0.5, pattern="unstructured")
    zero = model.weight.detach() == 0
    assert int(zero.sum()) == 256 and before[zero].max() <= before[~zero].min()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(x).abs().sum().backward()
    optimizer.step()
    made.step()
    assert torch.equal(model.weight == 0, zero)
    made.finalize()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*complex.*")
        torch.testing.assert_close(torch.compile(model, backend=fxprune.hwprune, options=FORCED)(x), model(x))


def test_taylor_scores_of_complex_weights_are_real() -> None:
    """|dL| of a weight that becomes zero, to first order: the real part of conj(gradient) * weight."""
    torch.manual_seed(0)
    model = nn.Linear(8, 64, bias=False, dtype=torch.complex64)
    x = torch.randn(4, 8, dtype=torch.complex64)
    once = fxprune.OneShotSchedule(1)
    made = fxprune.Pruner(model, x, sparsity=0.5, pattern="unstructured", schedule=once, importance="taylor")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    model(x).abs().sum().backward()
    gradient, weight = model.weight.grad, model.weight.detach().clone()
    scores = (torch.view_as_real(gradient) * torch.view_as_real(weight)).sum(-1).abs()
    optimizer.step()
    assert made.step()
    zero = model.weight.detach() == 0
    assert int(zero.sum()) == 256 and scores[zero].max() <= scores[~zero].min()


def test_an_optimizer_made_before_the_model_moved_in_place() -> None:
    """``Module.to`` keeps its parameters, as PyTorch does by default: the optimizer and the masks follow them."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5)
    made = pruner(model, sparsity=0.5)
    masks = made.state_dict()["masks"]
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)(rows().to(dtype)).sum().backward()
        optimizer.step()
        made.step()
        assert len(masks) == 2 and not any(model.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_an_optimizer_made_before_the_model_moved_to_new_parameters() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    old = list(model.parameters())
    made = pruner(model, sparsity=0.5)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    for parameter in old:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with pytest.raises(WrongOptimizer, match="Create the optimizer after the model was moved, converted or sharded"):
        made.step()
    result = fxprune.prune(mlp(), rows(), sparsity=0.5)
    with pytest.raises(NothingToPrune, match="Create it from result"):
        result.plan.hold(optimizer)
