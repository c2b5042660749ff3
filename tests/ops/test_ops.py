"""Every operator of ``OPS``, from its own record: values on each instruction set, opcheck, gradients, refusals, schema.

Reproduce one case with ``pytest tests/ops/test_ops.py -k "<operator>-<sample>"``.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fxprune.lowering import library
from torch import Tensor
from torch.utils._pytree import tree_map

from fxprune.ops import OPS, region
from fxprune.ops.activation import NAMES
from fxprune.ops.beside_graphs import REFERENCES
from fxprune.ops.bundle import bundle, unbundle
from fxprune.ops.operator import Operator
from tests.oracle import assert_close_fp64, assert_exact, integers, poisoned

CASES = [pytest.param(op, args, id=f"{op.name}-{i}") for op in OPS for i, args in enumerate(op.samples())]
BAD = [
    pytest.param(op, args, message, id=f"{op.name}-{i}-{message.replace('|', '_')}")
    for op in OPS
    for i, (args, message) in enumerate(op.bad_samples())
]
# pack and unpack scatter into zeros, and relu6 stops most gradients: what is left must not be all zeros
ZEROS = {
    "tile_pack": 0.97,
    "tile_unpack": 0.97,
    "tile_gemm": 0.75,
    "tile_conv": 0.75,
    "dsconv": 0.75,
    "region": 0.75,
    "nm_prune": 0.9,
    "skip_zeros_mm": 0.75,
    "skip_zeros_conv": 0.75,
}
EXACT = ("none", "relu", "relu6")
WITHOUT_GRADIENT = {
    "region",
    "rnn_steps",
    "nm_prune",
    "nm_mm",
    "depthwise_pool",
    "channel_norm",
    "attention",
    "attention_rows",
}
# a sigmoid between sums (tests/csrc/test_rnn.py has the exact cases); draws and quotients (tests/ops/test_nm_prune.py);
# a square root (tests/csrc/test_channel_norm.py); a softmax (tests/csrc/test_attention.py, test_attention_rows.py)
ROUNDS = {"rnn_steps", "nm_prune", "channel_norm", "attention", "attention_rows"}
WHOLE = [case for case in CASES if case.values[0].name not in ROUNDS]
DIFFERENTIABLE = [case for case in CASES if case.values[0].name not in WITHOUT_GRADIENT]
OTHERS = [case for case in CASES if case.values[0].name in WITHOUT_GRADIENT]
FIRST = [pytest.param(op, next(op.samples()), id=op.name) for op in OPS if op.name not in WITHOUT_GRADIENT]
needs_library = pytest.mark.skipif(not library.available(), reason="the compiled library is missing")


def overload(op: Operator) -> Callable[..., Any]:
    return getattr(torch.ops.fxprune, op.name).default


def whole(args: tuple[Any, ...], seed: int = 0, activation: str | None = None) -> tuple[Any, ...]:
    """Return the arguments with integers in every float tensor, also where a tap is dropped."""

    def draw(a: Any, number: int) -> Any:
        if isinstance(a, Tensor):
            return integers(*a.shape, seed=number).to(a.dtype) if a.is_floating_point() else a
        return [draw(t, 31 * number + i) for i, t in enumerate(a)] if isinstance(a, list) else a

    drawn = [draw(a, seed + i) for i, a in enumerate(args)]
    if activation is not None and isinstance(args[-1], str):
        drawn = [activation if isinstance(a, str) else a for a in drawn]
    elif activation is not None and len(args) == 5:
        parts = unbundle(args[1], region.numbers(args[2]))
        drawn[1] = bundle([draw(t, seed + i) for i, t in enumerate(parts)])[0]
        drawn[3] = with_activation(args[3], activation)
    return tuple(drawn)


def with_activation(program: str, activation: str) -> str:
    """Return a region's program with one activation in every step that has one."""
    changed: list[int] = []
    for code, arguments in region.records(region.numbers(program)):
        if code not in (region.MEAN, region.POOL):
            arguments[-1] = NAMES.index(activation)
        changed += [code, len(arguments), *arguments]
    return region.text(changed)


def listed(output: Any) -> list[Tensor]:
    return list(output) if isinstance(output, (list, tuple)) else [output]


def zeros(op: Operator) -> float:
    return ZEROS.get(op.name, 0.5)


def floats(args: tuple[Any, ...]) -> list[int]:
    return [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]


def with_grad(args: tuple[Any, ...], double: bool = False) -> tuple[Any, ...]:
    ready = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
    for i in floats(args):
        ready[i] = (ready[i].double() if double else ready[i]).requires_grad_()
    return tuple(ready)


def gradients(fn: Callable[..., Tensor], args: tuple[Any, ...], double: bool = False) -> list[Tensor]:
    """Return the output, and the gradient of each float input for an integer cotangent."""
    ready = with_grad(args, double)
    y = fn(*ready)
    cotangent = integers(*y.shape, seed=99).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [ready[i] for i in floats(args)], cotangent)]


@needs_library
@pytest.mark.parametrize(("op", "args"), WHOLE)
def test_values_equal_reference_on_every_isa(op: Operator, args: tuple[Any, ...], isa: str) -> None:
    for seed, activation in enumerate(EXACT):
        drawn = whole(args, seed, activation)
        repro = f"{op.name} {activation} on {isa}"
        with poisoned():
            given = overload(op)(*drawn)
        assert_exact(given, op.reference(*drawn), repro, activation == "none", zeros(op))
        for one, fake in zip(listed(given), listed(op.fake(*drawn)), strict=True):
            assert one.is_contiguous() and one.stride() == fake.stride(), repro


@needs_library
@pytest.mark.parametrize(("op", "args"), CASES)
def test_activations_close_to_fp64_on_every_isa(op: Operator, args: tuple[Any, ...], isa: str) -> None:
    wide = tree_map(lambda a: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a, args)
    assert_close_fp64(overload(op)(*args), op.reference(*args), op.reference(*wide), 1e-4, f"{op.name} on {isa}", zeros(op))


@pytest.mark.parametrize(("op", "args"), [*OTHERS, *FIRST])
def test_opcheck(op: Operator, args: tuple[Any, ...]) -> None:
    """As in inference; every sample of an operator with a gradient is checked with one below."""
    torch.library.opcheck(overload(op), args)


@pytest.mark.parametrize(("op", "args"), DIFFERENTIABLE)
def test_opcheck_with_gradients(op: Operator, args: tuple[Any, ...]) -> None:
    torch.library.opcheck(overload(op), with_grad(args))


@pytest.mark.parametrize(("op", "args"), OTHERS)
def test_a_missing_gradient_is_refused(op: Operator, args: tuple[Any, ...]) -> None:
    for position in (0, 1):
        if isinstance(args[position], Tensor) and not args[position].is_floating_point():
            continue
        ready = [list(a) if isinstance(a, list) else a for a in args]
        given = ready[position]
        if isinstance(given, list):
            given[0] = given[0].clone().requires_grad_()
        else:
            ready[position] = given.clone().requires_grad_()
        with pytest.raises(RuntimeError, match=f"fxprune::{op.name} has no gradient"):
            sum(y.sum() for y in overload(op)(*ready)).backward()


@pytest.mark.parametrize(("op", "args"), DIFFERENTIABLE)
def test_gradients_equal_reference(op: Operator, args: tuple[Any, ...]) -> None:
    linear = whole(args, 3, "none")
    given, expected = gradients(overload(op), linear), gradients(op.reference, linear)
    for part in zip(given, expected, strict=True):
        assert_exact(*part, repro=op.name, most_zeros=zeros(op))
    given, expected = gradients(overload(op), args), gradients(op.reference, args)
    exact = gradients(op.reference, args, double=True)
    for triple in zip(given, expected, exact, strict=True):
        assert_close_fp64(*triple, repro=op.name, most_zeros=zeros(op))


@pytest.mark.parametrize(("op", "args"), DIFFERENTIABLE)
def test_gradient_only_where_asked(op: Operator, args: tuple[Any, ...]) -> None:
    drawn = whole(args, 3, "none")
    expected = gradients(op.reference, drawn)[1:]
    for i, gradient in zip(floats(args), expected, strict=True):
        ready = list(drawn)
        ready[i] = drawn[i].clone().requires_grad_()
        y = overload(op)(*ready)
        (given,) = torch.autograd.grad(y, [ready[i]], integers(*y.shape, seed=99))
        assert_exact(given, gradient, f"{op.name} argument {i}", most_zeros=zeros(op))


@pytest.mark.parametrize(("op", "args"), DIFFERENTIABLE)
def test_gradcheck_is_exact_on_integers(op: Operator, args: tuple[Any, ...]) -> None:
    """The operators are linear in each operand: a central difference with step 1 has no error at all."""
    ready = with_grad(whole(args, 5, "none"))
    few = [i for i in floats(args) if ready[i].numel() <= 120]
    ready = tuple(a.detach() if isinstance(a, Tensor) and i not in few else a for i, a in enumerate(ready))
    if not few:
        pytest.skip("every operand is large; test_gradients_equal_reference covers them")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*double precision.*")
        assert torch.autograd.gradcheck(overload(op), ready, eps=1.0, atol=0.0, rtol=0.0, check_undefined_grad=False)


@pytest.mark.parametrize(("op", "args"), DIFFERENTIABLE)
def test_double_backward_is_right(op: Operator, args: tuple[Any, ...]) -> None:
    drawn = whole(args, 7, "none")
    expected = second(op.reference, drawn)
    for given, right in zip(second(overload(op), drawn), expected, strict=True):
        assert_exact(given, right, op.name, trusted=False)
    assert any(bool(t.any()) for t in expected) or len(floats(args)) == 1, "MISTRUSTED: no second derivative is non-zero"


def second(fn: Callable[..., Tensor], args: tuple[Any, ...]) -> list[Tensor]:
    ready = with_grad(args)
    leaves = [ready[i] for i in floats(args)]
    y = fn(*ready)
    first = torch.autograd.grad(y, leaves, integers(*y.shape, seed=98).requires_grad_(), create_graph=True)
    total = sum((g * integers(*g.shape, seed=97)).sum() for g in first)
    again = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(again, leaves, strict=True)]


@needs_library
@pytest.mark.parametrize(("op", "args", "message"), BAD)
def test_bad_arguments_are_refused(op: Operator, args: tuple[Any, ...], message: str) -> None:
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        overload(op)(*args)


@needs_library
@pytest.mark.parametrize("schema", library.SCHEMAS, ids=lambda s: s.partition("(")[0])
def test_schema_is_the_librarys(schema: str) -> None:
    declared = torch._C.parse_schema(f"fxprune::{schema}")
    name = schema.partition("(")[0]
    registered = getattr(torch.ops.fxprune, name).default._schema
    assert str(declared) == str(registered)
    assert registered.is_mutable == (name in ("clear_pruned", "add_squares"))


@needs_library
def test_every_operator_of_the_library_has_a_record() -> None:
    names = {schema.partition("(")[0] for schema in library.SCHEMAS}
    assert names - {"isa", "set_isa", *REFERENCES} == {op.name for op in OPS}


@needs_library
def test_unknown_isa_is_refused() -> None:
    before = torch.ops.fxprune.isa()
    with pytest.raises(RuntimeError, match="unknown or not supported"):
        torch.ops.fxprune.set_isa("mmx")
    assert torch.ops.fxprune.isa() == before


WITHOUT_LIBRARY = """
    import warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import fxprune
        fxprune.lowering.registration.register()
    from fxprune.errors import FxPruneWarning
    mine = [w for w in caught if issubclass(w.category, FxPruneWarning)]
    assert len(mine) == 1 and "without its C++ kernels" in str(mine[0].message), caught
    import torch
    from fxprune.lowering import library
    from fxprune.ops import OPS
    assert not library.available() and library.isa() == "none"
    for op in OPS:
        for args in op.samples():
            given = getattr(torch.ops.fxprune, op.name)(*args)
            torch.testing.assert_close(given, op.reference(*args), rtol=0, atol=0)
        torch.library.opcheck(getattr(torch.ops.fxprune, op.name).default, args)
    model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3, groups=8), torch.nn.ReLU(), torch.nn.Conv2d(8, 16, 1)).eval()
    x = torch.randn(2, 8, 9, 9)
    pruned = fxprune.prune(model, x, sparsity=0.5).model
    fast = torch.compile(pruned, backend=fxprune.hwprune, options={"fallback": "eager", "min_speedup": 0.0})
    with torch.no_grad():
        assert torch.equal(fast(x), pruned(x))
    assert "library is missing" in str(fxprune.explain(pruned, x))
    print("the same without the library")
"""


def test_everything_works_without_the_library() -> None:
    environment = {**os.environ, "FXPRUNE_LIBRARY": "/nonexistent/library.so"}
    script = textwrap.dedent(WITHOUT_LIBRARY)
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the same without the library" in done.stdout
