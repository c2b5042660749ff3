"""The binding of the CUDA operators, built on the simulator: checks, both layouts, and what it hands to the kernels."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fxprune.lowering import library
from fxprune.lowering.kernels.cuda import OPERATORS
from torch import Tensor

from fxprune.ops import OPS
from fxprune.ops import cuda_nm_image as nm_image
from fxprune.ops import cuda_tile_image as tile_image
from fxprune.ops.operator import Operator
from tests.cuda.test_tile_gemm_halved import halved

ROOT = Path(__file__).resolve().parents[2]
CUDA_OPS = [op for op in OPS if op.name in OPERATORS]
SAMPLES = [pytest.param(op, args, id=f"{op.name}-{i}") for op in CUDA_OPS for i, args in enumerate(op.samples())]
# what only the packer checks: values of index lists would have to be read back from a GPU
ON_THE_HOST = {"index", "columns", "tile_ptr", "float32", "nnz|values"}
BAD = [
    pytest.param(op, args, message, id=f"{op.name}-{i}")
    for op in CUDA_OPS
    for i, (args, message) in enumerate(op.bad_samples())
]


@pytest.fixture(scope="module")
def call() -> Callable[..., Tensor]:
    """Return call(operator, *arguments)."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if platform.machine() != "x86_64" or shutil.which(compiler[0]) is None or os.environ.get("FXPRUNE_SANITIZE") == "1":
        pytest.skip("needs a C++ compiler on x86-64, without sanitizers")
    package = Path(torch.__file__).parent
    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-DFXPRUNE_SIMULATED"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", f"-isystem{package / 'include'}"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]
    names = ("operators", "machine", "asynchronous", "shadow", "tensor_core")
    sources = [*sorted((ROOT / "csrc/cuda").glob("*.cpp")), *(ROOT / f"csrc/sim/{name}.cpp" for name in names)]
    digest = hashlib.sha256(repr([compiler, flags, torch.__version__]).encode())
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cpp")):
        digest.update(path.read_bytes())
    target = ROOT / "build" / f"binding-{digest.hexdigest()[:12]}.so"
    if not target.is_file():
        target.parent.mkdir(exist_ok=True)
        scratch = target.with_suffix(f".{os.getpid()}")
        link = [f"-L{package / 'lib'}", "-ltorch_cpu", "-o", str(scratch)]
        subprocess.run([*compiler, *flags, *map(str, sources), *link], check=True)
        scratch.replace(target)
    schemas = torch.library.Library("fxprune_simulated", "DEF")
    for schema in library.SCHEMAS:
        if schema.partition("(")[0] in OPERATORS:
            schemas.define(schema)
    torch.ops.load_library(target)
    return lambda name, *arguments, keep=schemas: getattr(torch.ops.fxprune_simulated, name)(*arguments)


def cast(args: tuple[Any, ...], dtype: torch.dtype) -> list[Any]:
    return [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("op", "args"), SAMPLES)
def test_samples(call: Callable[..., Tensor], op: Operator, args: tuple[Any, ...], dtype: torch.dtype) -> None:
    given = cast(args, dtype)
    if op.name == "nm_mm" and dtype == torch.float32:
        with pytest.raises(RuntimeError, match="x must be float16 or bfloat16"):
            call(op.name, *given)
        return
    got = call(op.name, *given)
    expected = op.reference(*[a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in given])
    outputs = [y if isinstance(y, list) else [y] for y in (got, expected, op.fake(*given))]
    for ours, exact, fake in zip(*outputs, strict=True):
        assert ours.shape == exact.shape and ours.dtype == dtype and ours.stride() == fake.stride()
        torch.testing.assert_close(ours, exact.to(dtype), atol=2e-2 if dtype == torch.bfloat16 else 2e-3, rtol=2e-2)


@pytest.mark.parametrize(("op", "args", "message"), BAD)
def test_bad_samples(call: Callable[..., Tensor], op: Operator, args: tuple[Any, ...], message: str) -> None:
    """Whatever shapes and types tell is refused. What values tell is not looked at, and not run here."""
    # a missing value may be a kept row of the last tile, where that is one feature narrower
    if message in ON_THE_HOST or (op.name, message) == ("tile_conv", "values"):
        pytest.skip("told by values, or legal on a GPU")
    with pytest.raises(RuntimeError, match=message):
        call(op.name, *args)


def test_types_are_not_mixed(call: Callable[..., Tensor]) -> None:
    op = next(op for op in OPS if op.name == "tile_gemm")
    args = list(next(op.samples()))
    with pytest.raises(RuntimeError, match="values must have the type of x"):
        call("tile_gemm", args[0], args[1].half(), *args[2:])
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16"):
        call("tile_gemm", args[0].double(), *args[1:])
    with pytest.raises(RuntimeError, match="index must be int32"):
        call("tile_gemm", *args[:2], args[2].long(), *args[3:])


@pytest.mark.parametrize("feature_dim", (1, -1))
def test_an_image_in_place_of_values(call: Callable[..., Tensor], feature_dim: int) -> None:
    op = next(op for op in OPS if op.name == "tile_gemm")
    for sample in op.samples():
        if sample[10] != feature_dim:
            continue
        args = cast(sample, torch.bfloat16)
        image = tile_image.build(args[1], args[3], args[9], len(args[4]))
        assert torch.equal(call("tile_gemm", args[0], image, *args[2:]), call("tile_gemm", *args))
        with pytest.raises(RuntimeError, match="values must have"):
            call("tile_gemm", args[0], image[:-1], *args[2:])


@pytest.mark.parametrize("feature_dim", (1, -1))
def test_an_image_of_values_kept_two_in_four(call: Callable[..., Tensor], feature_dim: int) -> None:
    for sample in next(op for op in OPS if op.name == "tile_gemm").samples():
        if sample[10] != feature_dim:
            continue
        x, values, index, tile_ptr, columns, *rest = cast(sample, torch.bfloat16)
        values = halved(values, tile_ptr, rest[4], len(columns), torch.Generator().manual_seed(0))
        image = nm_image.build(values, tile_ptr, rest[4], len(columns))
        dense = call("tile_gemm", x, values, index, tile_ptr, columns, *rest)
        torch.testing.assert_close(call("tile_gemm", x, image, index, tile_ptr, columns, *rest), dense)
        with pytest.raises(RuntimeError, match="values must have"):
            call("tile_gemm", x, image[:-1], index, tile_ptr, columns, *rest)
        window = ([1, 1], [1, 1], [0, 0], [1, 1])
        if x.dim() == 4 and rest[2] is None:
            with pytest.raises(RuntimeError, match="values must have the type of x"):
                call("tile_conv", x, image, index, tile_ptr, columns, *rest[:2], *rest[3:5], *window, 1, "none")
