"""csrc/cuda's binding built on the simulator, as operators of a namespace of their own; once a process may register it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fxprune.lowering import library
from fxprune.lowering.kernels.cuda import OPERATORS
from torch import Tensor

from fxprune.ops import OPS

ROOT = Path(__file__).resolve().parents[2]
COMPILED = tuple(op.name for op in OPS if op.name in OPERATORS)


@functools.cache
def binding() -> Callable[..., Tensor]:
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


@contextlib.contextmanager
def in_place_of_the_cpus() -> Iterator[list[str]]:
    """Let the operators of ``fxprune::`` that a GPU has run on the simulator; yields the names of those that ran."""
    run, ran = binding(), []
    library = torch.library.Library("fxprune", "IMPL")

    def simulated(name: str) -> Callable[..., Any]:
        def kernel(*args: Any) -> Any:
            ran.append(name)
            return run(name, *args)

        return kernel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of being overridden
        for name in COMPILED:
            library.impl(name, simulated(name), "CPU", allow_override=True)
    try:
        yield ran
    finally:
        library._destroy()
