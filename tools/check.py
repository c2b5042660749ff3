"""The checks that need no execution: format, lint, types, C++ format, file sizes. Runs all of them, then reports.

mypy sees a staged tree in which ``passes`` and ``lowering`` lie inside ``fxprune``, as they do when installed; on the
checkout it would silently leave both out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("fxprune", "passes", "lowering", "tests", "benchmarks", "examples", "tools", "setup.py")
LONGEST = {".py": 500, ".cpp": 400, ".h": 400, ".inc": 400, ".cu": 400, ".cuh": 400}


def main() -> int:
    folders = [f for f in FOLDERS if (ROOT / f).exists()]
    failed = [
        name
        for name, passed in (
            ("ruff check", run("ruff", "check", *folders)),
            ("ruff format", run("ruff", "format", "--check", *folders)),
            ("mypy", types()),
            ("clang-format", cpp_format()),
            ("file sizes", sizes()),
        )
        if not passed
    ]
    print("check: " + ("failed: " + ", ".join(failed) if failed else "all passed"))
    return 1 if failed else 0


def run(*command: str, env: dict[str, str] | None = None) -> bool:
    """Run a tool of this interpreter's environment from the root."""
    print("==", *command[:3], flush=True)
    tool = find(command[0])
    return tool is not None and subprocess.run([tool, *command[1:]], cwd=ROOT, env=env).returncode == 0


def find(name: str) -> str | None:
    """Return a tool's path, the one beside this interpreter first."""
    local = Path(sys.executable).parent / name
    tool = str(local) if local.exists() else shutil.which(name)
    if tool is None:
        print(f"{name} is not installed")
    return tool


def types() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        stage = Path(folder) / "fxprune"
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / "fxprune", stage, ignore=ignore)
        for inner in ("passes", "lowering"):
            shutil.copytree(ROOT / inner, stage / inner, ignore=ignore)
        env = {**os.environ, "MYPYPATH": folder}
        cache = str(ROOT / ".mypy_cache")
        return run("mypy", "-p", "fxprune", "--config-file", "pyproject.toml", "--cache-dir", cache, env=env)


def cpp_format() -> bool:
    """Show the first line of each C++ file that clang-format would change, in one run of it over all."""
    sources = [str(p) for p in sorted((ROOT / "csrc").rglob("*")) if p.suffix in (".cpp", ".h", ".cu", ".cuh")]
    return run("clang-format", "--dry-run", "--Werror", *sources)


def sizes() -> bool:
    long = []
    for folder in (*FOLDERS, "csrc"):
        path = ROOT / folder
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            limit = LONGEST.get(file.suffix)
            if limit and file.is_file() and (lines := len(file.read_text().splitlines())) > limit:
                long.append(f"{file.relative_to(ROOT)}: {lines} lines, at most {limit}")
    print("\n".join(["== file sizes", *long]))
    return not long


if __name__ == "__main__":
    sys.exit(main())
