"""Whole pruned models compiled as for a GPU, with the simulator in place of the kernels: what passes hand to the binding.

Plans are made, weights packed and graphs rewritten as on a GPU; tensors stay on the CPU. float16 too, which the CPU's own
kernels do not have.
"""

from __future__ import annotations

import copy
import importlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fxprune.lowering import kernels
from fxprune.lowering.kernels import KernelTables, cuda
from fxprune.lowering.kernels.impl import Impl
from torch import Tensor, nn

import fxprune
from fxprune import pipeline
from fxprune.match import Match
from fxprune.sparsity import tile
from tests.cuda.binding import COMPILED, in_place_of_the_cpus
from tests.cuda.simulator import ELEMENTS
from tests.gpu.test_models import Feed, pair
from tests.oracle import FORCED

planning = vars(importlib.import_module("fxprune.passes.plan"))  # the package exports the pass under this name


class Separable(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*pair(8, 16, 3, 1), *pair(16, 16, 5, 2), *pair(16, 24, 7, 1))


class Excited(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(8, 16, 3, 2, 1), nn.Conv2d(16, 16, 5, 1, 2, groups=16)
        self.norm, self.project = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.silu(self.norm(self.depthwise(nn.functional.silu(self.stem(x)))))
        gate = torch.sigmoid(self.excite(nn.functional.silu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.project(y * gate)


class Small(Feed):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.norm, self.up, self.down = nn.LayerNorm(96), nn.Linear(96, 128), nn.Linear(128, 96)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Compile as for a GPU; the operators that ran, in order."""
    imaged = tile.imaged
    monkeypatch.setattr(
        tile, "imaged", lambda given, tiling, device, *rest: imaged(given, tiling, torch.device("cuda"), *rest)
    )
    monkeypatch.setattr(KernelTables, "unit", lambda self, kind, *_, **__: cuda.UNITS["sm_80"][kind])
    impls = tuple(Impl(name, "cuda", kernels.cpu.operator(name), lambda *_: None) for name in COMPILED)
    monkeypatch.setattr(KernelTables, "candidates", lambda self, op: [i for i in impls if i.op == op])
    monkeypatch.setattr(Match, "on_gpu", property(lambda self: True))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # by default convolutions may use TF32
    monkeypatch.setattr(pipeline, "JOINS", tuple(join for join in pipeline.JOINS if join is not pipeline.form_regions))
    torch._dynamo.reset()
    with in_place_of_the_cpus() as ran:
        yield ran
    torch._dynamo.reset()


CASES = (
    ("separable", Separable, (2, 8, 9, 9), {"depthwise_taps": 3, "tile_gemm": 3}),
    ("excited", Excited, (2, 8, 9, 9), {"tile_conv": 1, "depthwise_taps": 1, "tile_gemm": 3}),
    ("feed", Small, (2, 5, 96), {"tile_gemm": 2}),
)


def compile_and_compare(model: nn.Module, shape: tuple[int, ...], dtype: torch.dtype, tolerance: float = 1e-6) -> float:
    model, x = model.to(dtype), torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    fast = torch.compile(model, backend="hwprune", options={**FORCED, "require_sparse": True})
    with torch.no_grad():
        expected, exact = model(x), copy.deepcopy(model).double()(x.double())
        got = fast(x)
    ours, theirs = ((y.double() - exact).abs().max().item() for y in (got, expected))
    assert got.dtype == dtype and ours <= 2 * theirs + tolerance * exact.abs().max().item()
    return ours / exact.abs().max().item()


def of_graphs(seen: list[str]) -> list[str]:
    """The kernels that graphs call: one more packs the weights, when they are compiled."""
    return [op for op in seen if op != "tile_pack"]


@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize(("name", "build", "shape", "counts"), CASES, ids=[c[0] for c in CASES])
def test_models(
    name: str, build: type[nn.Module], shape: tuple[int, ...], counts: dict[str, int], dtype: torch.dtype, seen: list[str]
) -> None:
    torch.manual_seed(0)
    model = fxprune.prune(build().eval(), (torch.randn(1, *shape[1:]),), sparsity=0.5).model
    compile_and_compare(model, shape, dtype)
    assert Counter(of_graphs(seen)) == counts


@pytest.mark.parametrize(("name", "build", "shape", "counts"), CASES[::2], ids=[c[0] for c in CASES[::2]])
def test_tf32(
    name: str, build: type[nn.Module], shape: tuple[int, ...], counts: dict[str, int], seen: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Where PyTorch may multiply so, float32 layers do; their error tells."""
    torch.manual_seed(0)
    model = fxprune.prune(build().eval(), (torch.randn(1, *shape[1:]),), sparsity=0.5).model
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", name == "separable")
    torch.set_float32_matmul_precision("highest" if name == "separable" else "high")
    try:
        error = compile_and_compare(model, shape, torch.float32, 2e-3)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert error > 1e-5 and Counter(of_graphs(seen)) == counts


@pytest.mark.parametrize("pattern", ("tvw", "2:4"))
@pytest.mark.parametrize("dtype", ELEMENTS[1:], ids=str)
def test_two_in_four(pattern: str, dtype: torch.dtype, seen: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The form of the sparse tensor cores, where it is measured to be the fastest, from the plan to the kernel."""
    halved: list[bool] = []
    form = planning["halved"]

    def only(*args: Any) -> Any:
        found = form(*args)
        halved.append(found is not None)
        return found

    monkeypatch.setitem(planning, "halved", only)
    monkeypatch.setitem(planning, "forms", lambda *_: [])
    monkeypatch.setitem(planning, "_may_be_halved", lambda match, ctx: True)
    torch.manual_seed(0)
    model = fxprune.prune(
        Small().eval(), (torch.randn(1, 5, 96),), sparsity=0.5 if pattern == "2:4" else 0.6, pattern=pattern
    ).model
    compile_and_compare(model, (2, 5, 96), dtype)
    assert halved == [True, True] and of_graphs(seen) == ["tile_gemm"] * 2
