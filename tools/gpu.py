"""Everything that needs a GPU, in one command: build, tests, sanitizers, benchmarks. See docs/cuda.md.

    python tools/gpu.py [--minutes 9] [--only build,tests,sanitizer,bench]

Steps are given shares of the time, and one that runs out is stopped and reported; the others still run. Sanitizers that
their share has no time for are named and left out. Exit status: 0 when all passed, 1 when one failed, 2 where there is no
GPU (nothing is run then).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STEPS = ("build", "tests", "sanitizer", "bench")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SHARES = {"build": 0.35, "tests": 0.4, "sanitizer": 0.3, "bench": 1.0}  # of the time that is left
SANITIZER_SECONDS = 45.0  # that one needs to begin with: it slows the start of Python too


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--only", default=",".join(STEPS), help="comma-separated steps")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(STEPS):
        parser.error(f"unknown step {', '.join(sorted(unknown))}; legal: {', '.join(STEPS)}")
    reason = missing()
    if reason is not None:
        print(f"gpu: nothing was run: {reason}")
        return 2
    end = time.monotonic() + 60 * options.minutes
    failed = []
    for step in STEPS:
        if step not in wanted:
            continue
        start = time.monotonic()
        seconds = max(20.0, SHARES[step] * (end - start))
        problems = run_step(step, seconds)
        failed += problems
        print(f"gpu: {step} {'failed' if problems else 'passed'} in {time.monotonic() - start:.0f} s", flush=True)
    print("gpu: " + ("failed: " + "; ".join(failed) if failed else "all passed"))
    return 1 if failed else 0


def missing() -> str | None:
    """Return why nothing can run here, None when it can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; use one that has it (FXPRUNE_PYTHON=... make gpu)"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if shutil.which(os.environ.get("NVCC", "nvcc").split()[0]) is None and not any((ROOT / "fxprune").glob("_C_cuda.so")):
        return "there is neither nvcc nor a built fxprune/_C_cuda.so"
    return None


def run_step(step: str, seconds: float) -> list[str]:
    """Run one step within a time; return what failed."""
    if step == "build":
        if shutil.which(os.environ.get("NVCC", "nvcc").split()[0]) is None:
            return []
        return call(step, seconds, "setup.py", "--quiet", "build_ext", "--inplace", "egg_info", FXPRUNE_CUDA="1")
    if step == "tests":
        return call(step, seconds, "-m", "pytest", "tests/gpu", "-q", "--durations=5", "-p", "no:cacheprovider")
    if step == "bench":
        return call(step, seconds, "benchmarks/bench_gpu.py", "--seconds", str(int(seconds - 10)))
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print("gpu: sanitizer skipped, there is no compute-sanitizer")
        return []
    tests = ("-m", "pytest", "tests/gpu/test_small.py", "-q", "-x", "-p", "no:cacheprovider")
    problems = []
    chosen = sanitizers(seconds)
    if left_out := SANITIZERS[len(chosen) :]:
        print(f"gpu: no time for {', '.join(left_out)}; run them with --only sanitizer")
    for name in chosen:
        prefix = (tool, "--tool", name, "--error-exitcode", "9", "--target-processes", "all")
        problems += call(name, seconds / len(chosen), *tests, prefix=prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    return problems


def sanitizers(seconds: float) -> tuple[str, ...]:
    """Return those that fit, the one for memory first."""
    return SANITIZERS[: max(1, int(seconds // SANITIZER_SECONDS))]


def call(name: str, seconds: float, *arguments: str, prefix: tuple[str, ...] = (), **environment: str) -> list[str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    threads = str(min(16, os.cpu_count() or 1))
    env = {
        **os.environ,
        "PYTHONPATH": path,
        "TORCHINDUCTOR_COMPILE_THREADS": threads,
        "PYTHONUNBUFFERED": "1",
        **environment,
    }
    try:
        done = subprocess.run([*prefix, sys.executable, *arguments], cwd=ROOT, env=env, timeout=seconds)
    except subprocess.TimeoutExpired:
        return [f"{name} ran past {seconds:.0f} s"]
    return [] if done.returncode == 0 else [f"{name} ended with {done.returncode}"]


if __name__ == "__main__":
    sys.exit(main())
