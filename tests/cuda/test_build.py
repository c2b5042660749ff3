"""The CUDA library as it is built: what its kernels need of a GPU, and that it loads where there is none."""

from __future__ import annotations

import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch
from fxprune.lowering import library
from fxprune.lowering.kernels import TABLES, cuda
from torch._subclasses.fake_tensor import FakeTensorMode

ROOT = Path(__file__).resolve().parents[2]
NVCC = os.environ.get("NVCC", "nvcc").split()[0]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_resources", ROOT / "tools/cuda_resources.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REPORT = """
ptxas info    : Compiling entry function '_ZN7fxprune3gpu5entryINS0_11TileGemmMmaINS0_4HalfELi64EEEEEvNT_4ArgsE' for 'sm_80'
ptxas info    : Function properties for _ZN7fxprune3gpu5entryINS0_11TileGemmMmaINS0_4HalfELi64EEEEEvNT_4ArgsE
    16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 80 registers, used 1 barriers
"""
SASS = """
arch = sm_80
		Function : _ZN7fxprune3gpu5entryINS0_11TileGemmMmaINS0_4HalfELi64EEEEEvNT_4ArgsE
        /*0000*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0010*/              @!P0 HMMA.16816.F32 R4, R4, R6, R8 ;
        /*0020*/                   STL [R1], R2 ;
"""


def test_reports_are_read(tool: ModuleType) -> None:
    key = "TileGemmMma-Half-64 sm_80"
    assert tool.parse_report(REPORT) == {key: {"stack": 16, "spilled": 20, "registers": 80}}
    counts = tool.parse_sass(SASS)[key]
    assert (counts["LDGSTS"], counts["HMMA"], counts["STL"], counts["LDL"]) == (1, 1, 1, 0)
    with pytest.raises(SystemExit, match="Performance Loss"):
        tool.parse_report("ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized")


def test_worse_kernels_are_reported(tool: ModuleType) -> None:
    key = "TileGemmMma-Half-64 sm_80"
    good = {"stack": 0, "spilled": 0, "registers": 80, "HMMA": 16, "LDGSTS": 6, "LDSM": 8, "LDL": 0, "STL": 0}
    assert tool.compare({key: good}, {key: good}, True) == []
    for change, message in (
        ({"registers": 81}, "81 registers"), ({"spilled": 4}, "4 bytes spilled"), ({"stack": 8}, "8 stack"),
        ({"HMMA": 0}, "no HMMA"), ({"LDL": 2}, "2 LDL"),
    ):  # fmt: skip
        (problem,) = tool.compare({key: {**good, **change}}, {key: good}, True)
        assert message in problem
    assert "not in the table" in tool.compare({key: good}, {}, True)[0]
    assert "gone" in tool.compare({}, {key: good}, True)[0]


def test_a_kernel_that_takes_registers_must_start_with_enough(tool: ModuleType) -> None:
    key = "TileGemmWgmma-Half-256-0 sm_90a"
    good = {"stack": 0, "spilled": 0, "registers": 168}
    assert tool.compare({key: good}, {key: good}, False) == []
    (problem,) = tool.compare({key: {**good, "registers": 160}}, {key: good}, False)
    assert "starts with 160 registers" in problem


def test_instructions_per_output_are_counted_and_held(tool: ModuleType) -> None:
    code = [
        "FFMA before",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "@!P0 BRA 0x60",
        "FFMA R0, R1, R2, R3",
        "BRA 0x60",
        "LDS skipped",
        "FFMA",
    ]
    assert tool.executed(code, 2) == 4
    with pytest.raises(SystemExit, match="does not look as expected"):
        tool.executed(code, 3)
    key = "DepthwiseTiles-Half-7-1-8-0 sm_90a"
    row = {"stack": 0, "spilled": 0, "registers": 80, "FFMA": 9, "LDGSTS": 1, "per_output": 55.0}
    assert tool.compare({key: row}, {key: row}, True) == []
    (problem,) = tool.compare({key: {**row, "per_output": 55.2}}, {key: row}, True)
    assert "55.2 instructions per output, the target is 55.0" in problem


def test_every_kernel_is_in_the_table(tool: ModuleType) -> None:
    """One row per kernel and target, without a spill; the tensor-core kernels have their instructions."""
    table = tool.json.loads(tool.TABLE.read_text())
    assert {key.rpartition(" ")[2] for key in table} == {"sm_80", "sm_90a"}
    assert len({key for key in table if key.endswith("sm_80")}) == len(table) / 2
    assert tool.compare(table, table, True) == []


def test_what_the_table_was_made_from_is_known(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change in a header two includes away, in the table or in the compiler is one."""
    read, changed = Path.read_bytes, ""
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + (b"#" if path.name == changed else b""))
    first = tool.made_from("nvcc 13")
    assert tool.made_from("nvcc 13") == first != tool.made_from("nvcc 14")
    for changed in ("tile_gemm.cu", "hopper.cuh", "resources.json"):
        assert tool.made_from("nvcc 13") != first, changed
    assert {path.suffix for path in tool.sources()} == {".cu", ".cuh", ".h"}


needs_nvcc = pytest.mark.skipif(shutil.which(NVCC) is None, reason=f"there is no {NVCC}")


@needs_nvcc
@pytest.mark.slow
def test_kernels_need_no_more_than_the_table() -> None:
    """Minutes of compiling where a kernel changed and the table was not written anew."""
    command = [sys.executable, "tools/cuda_resources.py", "--if-changed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def built() -> Path:
    """The library for one target, compiled without optimising: what it registers is the same."""
    env = {
        **os.environ,
        "FXPRUNE_CUDA": "1",
        "FXPRUNE_CUDA_TARGETS": "-gencode=arch=compute_80,code=compute_80",
        "NVCC": f"{os.environ.get('NVCC', 'nvcc')} -Xcicc -O0",
    }
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", "build/cuda-quick"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return ROOT / "build/cuda-quick/fxprune/_C_cuda.so"


@needs_nvcc
@pytest.mark.slow
def test_library_loads_beside_any_torch(built: Path) -> None:
    """It needs no CUDA library, registers its kernels for GPUs, and leaves the CPU's alone."""
    code = f"""
import torch, fxprune
from fxprune.ops import depthwise_taps
args = next(depthwise_taps.samples())
before = torch.ops.fxprune.depthwise_taps(*args)
torch.ops.load_library({str(built)!r})
from fxprune.lowering.kernels.cuda import OPERATORS as names
assert all(torch._C._dispatch_has_kernel_for_dispatch_key("fxprune::" + n, "CUDA") for n in names)
assert torch.equal(torch.ops.fxprune.depthwise_taps(*args), before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_nvcc_a_build_that_was_asked_for_fails() -> None:
    env = {**os.environ, "FXPRUNE_CUDA": "1", "NVCC": "no-such-nvcc"}
    command = [sys.executable, "-c", "import setup; setup.wants_cuda() and print(setup.nvcc())"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "['no-such-nvcc']", done.stderr
    done = subprocess.run(command, cwd=ROOT, env={**env, "FXPRUNE_CUDA": "yes"}, capture_output=True, text=True)
    assert "FXPRUNE_CUDA must be 0 or 1, got 'yes'" in done.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
@pytest.mark.parametrize(("version", "reads"), (("75.8.0", False), ("77.0.1", True)))
def test_an_old_setuptools_builds_the_kernels(version: str, reads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses our pyproject.toml, whose licence is written as newer ones want it."""
    monkeypatch.setattr(setuptools, "__version__", version)
    monkeypatch.chdir(ROOT)
    made = runpy.run_path("setup.py", run_name="a test")["Kernels"]({"name": "fxprune"})
    made.parse_config_files()
    assert bool(made.packages) == reads and made.get_name() == "fxprune"


def test_a_torch_without_cuda_says_so() -> None:
    assert library.cuda_missing() == "this torch has no CUDA"


def test_supports_names_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        half = torch.empty(2, 3, device="cuda", dtype=torch.float16)
        single, double = half.float(), half.double()
        cpu = torch.empty(2, 3)
    monkeypatch.setattr(library, "cuda_missing", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert cuda.supports(half, half) is None
    assert cuda.supports(half, half.to(torch.uint8)) is None  # an image of a packed weight
    assert cuda.supports(half, half.to(torch.int8)) is None  # one of a weight kept two in four
    assert "got uint8" in str(cuda.supports(half.to(torch.uint8), half))
    assert "needs a GPU, got cpu" in str(cuda.supports(cpu, cpu))
    assert "got float64" in str(cuda.supports(double, double))
    assert "in one type" in str(cuda.supports(half, single))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "needs compute capability 8.0, got 7.5" in str(cuda.supports(half, half))
    monkeypatch.setattr(library, "cuda_missing", lambda: "fxprune/_C_cuda.so has not been built")
    assert cuda.supports(half, half) == "fxprune/_C_cuda.so has not been built"


def test_every_cuda_kernel_has_an_impl() -> None:
    binding = "".join(path.read_text() for path in (ROOT / "csrc/cuda").glob("*.cpp"))
    names = {impl.op for table in TABLES for impl in table if impl.provider == "cuda"}
    assert names == set(cuda.OPERATORS) == {line.split('"')[1] for line in binding.splitlines() if "m.impl(" in line}
