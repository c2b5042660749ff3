"""The shape of the repository: import directions, file sizes, the backend's registration, what a wheel holds."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fxprune", "passes", "lowering")
SOURCES = sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# the modules that may put passes, lowering and the vocabulary together
_COMBINE = ("apply", "backend", "capture", "cli", "doctor", "explain", "export", "pipeline", "prune")
COMBINERS = {"fxprune", *(f"fxprune.{name}" for name in _COMBINE)}  # the package registers the operators when it is imported


def _module(path: Path) -> str:
    """Return the name a file has when installed: passes/plan.py is fxprune.passes.plan."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] != "fxprune":
        parts.insert(0, "fxprune")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path) -> Iterator[str]:
    """Yield the absolute names a file imports anywhere, relative imports resolved; ``from a import b`` is ``a.b``."""
    package = _module(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _id(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=_id)
def test_import_direction(path: Path) -> None:
    module, names = _module(path), list(_imports(path))
    inside = next((p for p in ("fxprune.passes", "fxprune.lowering") if _within(module, p)), None)
    for name in names:
        top = name.partition(".")[0]
        assert top not in ("passes", "lowering", "tests", "benchmarks", "examples", "tools"), f"{module} imports {name}"
        if inside:
            other = {"fxprune.passes": "fxprune.lowering", "fxprune.lowering": "fxprune.passes"}[inside]
            assert not _within(name, other), f"{module} imports {name}: passes and lowering do not know each other"
            assert not any(_within(name, c) for c in COMBINERS - {"fxprune"}), f"{module} imports the combiner {name}"
        elif _within(name, "fxprune.passes") or _within(name, "fxprune.lowering"):
            assert module in COMBINERS, f"{module} imports {name}; only {sorted(COMBINERS)} combine"
        if top == "sympy":
            assert module == "fxprune.cost", f"{module} imports sympy"
        assert top != "torch_tensorrt", f"{module} imports torch_tensorrt"


def test_a_wrong_import_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    wrong = tmp_path / "passes" / "wrong.py"
    wrong.parent.mkdir()
    wrong.write_text("from ..lowering import library\n")
    assert list(_imports(wrong)) == ["fxprune.lowering.library"]
    with pytest.raises(AssertionError, match="do not know each other"):
        test_import_direction(wrong)
    wrong.write_text("def late():\n    import sympy\n")
    with pytest.raises(AssertionError, match="sympy"):
        test_import_direction(wrong)


def test_only_library_loads_the_shared_object() -> None:
    loaders = {"load_library", "CDLL", "LoadLibrary"}
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = getattr(node.func, "attr", getattr(node.func, "id", ""))
                if called in loaders:
                    found.add(_id(path))
    assert found == {"lowering/library.py"}


@pytest.mark.parametrize("package", ["passes", "lowering"])
def test_no_second_name(package: str) -> None:
    """``import passes`` from the checkout would register every operator twice."""
    done = subprocess.run([sys.executable, "-c", f"import {package}"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert "ImportError" in done.stderr


@pytest.mark.parametrize("path", EXAMPLES, ids=_id)
def test_examples_have_main(path: Path) -> None:
    functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    assert functions, f"{_id(path)} has no main()"
    assert functions[0].args.args, "main(argv) takes its arguments, so that a test can call it"


def test_there_are_examples() -> None:
    assert {p.name for p in EXAMPLES} >= {"demo.py", "digits.py"}


def test_file_sizes() -> None:
    folders = (*PACKAGES, "tests", "benchmarks", "examples", "tools")
    files = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    assert len(files) > 20
    assert {_id(p): n for p in files if (n := len(p.read_text().splitlines())) > 500} == {}
    native = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert native
    assert {_id(p): n for p in native if (n := len(p.read_text().splitlines())) > 400} == {}


def test_entry_point_is_registered() -> None:
    points = [p for p in metadata.entry_points(group="torch_dynamo_backends") if p.name == "hwprune"]
    assert {p.value for p in points} == {"fxprune.backend:hwprune"}


def test_backend_needs_no_import() -> None:
    code = "import sys, torch; print('hwprune' in torch._dynamo.list_backends(exclude_tags=()), 'fxprune' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_every_package_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert listed == {_module(p) for p in SOURCES if p.name == "__init__.py"}
    assert {_module(p).rpartition(".")[0] for p in SOURCES if p.name != "__init__.py"} <= listed


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    """A wheel built without a compiler holds every source file where it is imported from, and imports from there."""
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "*.egg-info", "__pycache__", "results", "tests")
    shutil.copytree(ROOT, tree, ignore=skip)
    env = {**os.environ, "CXX": "no-such-compiler"}
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*build, "-w", str(tmp_path), str(tree)], check=True, env=env, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-" in wheel.name
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    assert names >= {_module_file(p) for p in SOURCES}
    assert not [n for n in names if n.partition("/")[0] in ("passes", "lowering", "tests", "csrc")]
    code = "import fxprune, fxprune.passes, fxprune.lowering.kernels; print(fxprune.__file__)"
    env = {**os.environ, "PYTHONPATH": str(site), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout


def _module_file(path: Path) -> str:
    relative = path.relative_to(ROOT).as_posix()
    return relative if relative.startswith("fxprune/") else f"fxprune/{relative}"
