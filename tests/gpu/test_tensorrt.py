"""Torch-TensorRT builds engines of pruned models, where it is installed, and they compute what the models compute.

The standard program it is handed is checked on every GPU.
"""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.config import Config
from fxprune.export import sparse_program
from tests.gpu.test_models import Feed, Separable

pytestmark = pytest.mark.slow
CASES = (("separable", Separable, (8, 64, 28, 28)), ("feed", Feed, (4, 128, 256)))


def imports() -> bool:
    try:
        importlib.import_module("torch_tensorrt")
    except Exception:  # without TensorRT's libraries the import fails in many ways
        return False
    return True


needs_tensorrt = pytest.mark.skipif(not imports(), reason="torch_tensorrt cannot be imported")


@pytest.fixture(params=CASES, ids=[c[0] for c in CASES])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, torch.Tensor]:
    _, build, shape = request.param
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = fxprune.prune(build().eval(), (torch.randn(1, *shape[1:]),), sparsity=0.6).model.cuda()
    return model, torch.randn(shape, device="cuda")


def check(model: nn.Module, x: torch.Tensor, output: torch.Tensor) -> None:
    """TensorRT may multiply in TF32, which keeps ten bits."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
    error = (output.double() - exact).abs().max().item() / exact.abs().max().item()
    assert error < 5e-3, error


def test_the_program_of_standard_operators(case: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = case
    program, ctx = sparse_program(model, x, Config(autotune="off", min_speedup=0.0), None, True)
    assert ctx.counts["decompose"] > 0
    assert not [n for n in program.graph.nodes if getattr(n.target, "namespace", "") == "fxprune"]
    with torch.no_grad():
        check(model, x, program.module()(x))


@needs_tensorrt
def test_an_exported_engine(case: tuple[nn.Module, torch.Tensor], tmp_path: Path) -> None:
    model, x = case
    path = tmp_path / "m.trt"
    written = fxprune.export(model, x, path, format="torch_tensorrt", tensorrt={"min_block_size": 1})
    assert written.partition is not None and written.partition.operators is not None
    assert written.partition.operators[0] == written.partition.operators[1]
    with torch.no_grad():
        check(model, x, torch.export.load(path).module()(x))


@needs_tensorrt
def test_engines_around_our_kernels(case: tuple[nn.Module, torch.Tensor]) -> None:
    model, x = case
    options: dict[str, Any] = {"fallback": "tensorrt", "freeze": True, "tensorrt": {"min_block_size": 1}}
    fast = torch.compile(model, backend="hwprune", options={**options, "autotune": "off", "min_speedup": 0.0})
    with torch.no_grad():
        check(model, x, fast(x))
