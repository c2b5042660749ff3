"""Packages of AOTInductor: from Python, and from C++ without Python."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from fxprune.lowering import library

import fxprune
from fxprune.errors import ExportFileError
from tests.oracle import assert_exact
from tests.test_export import CHOSEN, record, rewritten
from tests.test_plan_file import same_plan
from tests.toys import image, mobile, pruned, run

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow
if not library.available():
    pytest.skip("the C++ library is not built", allow_module_level=True)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return pruned(mobile(), image(), granularity=8)


@pytest.fixture(scope="module")
def package(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "m.pt2"
    written = fxprune.export(model, image(), path, format="aoti", dynamic_shapes="batch", **CHOSEN)
    assert written.bytes == path.stat().st_size and "3 of 3 matches" in str(written)
    return path


def test_from_python(model: torch.nn.Module, package: Path) -> None:
    loaded = fxprune.load(package)
    assert loaded.manifest.kind == "aoti" and loaded.manifest.operators == ("fxprune.region.default",)
    assert same_plan(loaded.plan, fxprune.Plan.of(model))
    for batch in (1, 2, 5):
        assert_exact(loaded(image(batch)), run(model, image(batch)))


def test_a_missing_operator_is_named(package: Path) -> None:
    with pytest.raises(ExportFileError, match=r"calls fxprune\.warp\.default"):
        fxprune.load(rewritten(package, record(operators=["fxprune.warp.default"])))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not installed")
    build = tmp_path_factory.mktemp("cpp")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run(["cmake", "-S", ROOT / "examples/cpp", "-B", build, prefix], check=True, capture_output=True, timeout=300)
    subprocess.run(["cmake", "--build", build], check=True, capture_output=True, timeout=600)
    return build / "run_package"


def test_from_cpp(program: Path, model: torch.nn.Module, package: Path, tmp_path: Path) -> None:
    x = image(3)
    x.numpy().tofile(tmp_path / "x.f32")
    run(model, x).numpy().tofile(tmp_path / "y.f32")
    command = [program, package, library.path(), tmp_path / "x.f32", "3x16x8x8"]
    done = subprocess.run([*command, tmp_path / "y.f32"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "output [3, 24]" in done.stdout and "largest difference 0," in done.stdout
    (run(model, x) + 1).numpy().tofile(tmp_path / "wrong.f32")
    wrong = subprocess.run([*command, tmp_path / "wrong.f32"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 1 and re.search(r"largest difference [1-9]", wrong.stdout)
    linked = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    assert "libpython" not in linked


def test_cpp_says_what_is_wrong(program: Path, package: Path, tmp_path: Path) -> None:
    (tmp_path / "x.f32").write_bytes(b"1234")
    library_path = str(library.path())
    cases = [
        ([], "usage: "),
        ([package, "none.so", "x", "1"], "operators: "),
        ([package, library_path, tmp_path / "x.f32", "2x3"], "holds 4 bytes, expected 24"),
    ]
    for arguments, message in cases:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and message in done.stderr
