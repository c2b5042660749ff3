"""Everything that needs a GPU, in one command: build, tests, sanitizers, benchmarks. See docs/cuda.md.

    python tools/gpu.py [--minutes 9] [--only build,tests,sanitizer,bench] [--out FOLDER]

Steps are given shares of the time, the last one all that is left. One that runs out is stopped and reported; the others
still run, and the benchmarks have at least a third. Kernels that cannot be loaded end it. Every file of tests, and every
sanitizer, has a process and a report of its own in build/gpu: a kernel that hangs takes nothing else along. A test that
hangs is named, and its file begins again without it. --out is where the benchmarks' figures go, by default
benchmarks/results/; they are written row by row. Exit status: 0 when all passed, 1 when one failed, 2 where there is no
GPU (nothing is run then).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "build/gpu"
STEPS = ("build", "tests", "sanitizer", "bench")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
SHARES = {"build": 0.35, "tests": 0.3, "sanitizer": 0.25, "bench": 1.0}  # of the time that is left
SHOWN = 40  # lines of the report of what failed
# Others' plugins and warnings are no failures of ours; what takes long says where it is.
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "-W", "default", "-o", "faulthandler_timeout=60")
WATCHED = ("-p", "tests.gpu.watchdog")  # a test that takes too long ends its process
LOADED = "import fxprune; from fxprune.lowering import library; raise SystemExit(library.cuda_missing())"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--only", default=",".join(STEPS), help="comma-separated steps")
    parser.add_argument("--out", type=Path, help="a folder for the benchmarks' figures")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(STEPS):
        parser.error(f"unknown step {', '.join(sorted(unknown))}; legal: {', '.join(STEPS)}")
    reason = missing()
    if reason is not None:
        print(f"gpu: nothing was run: {reason}")
        return 2
    REPORTS.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    failed = []
    steps = [step for step in STEPS if step in wanted]
    for step in steps:
        start = time.monotonic()
        share = SHARES[step] if step != steps[-1] else 1.0
        if step != "build" and (unloaded := call("loading the kernels", 120.0, "-c", LOADED)):
            failed += [*unloaded, f"{step} was not run"]
            break
        problems = run_step(step, max(20.0, share * (end - start)), options.out)
        failed += problems
        print(f"gpu: {step} {'failed' if problems else 'passed'} in {time.monotonic() - start:.0f} s", flush=True)
    print("gpu: " + ("failed: " + "; ".join(failed) if failed else "all passed"))
    return 1 if failed else 0


def missing() -> str | None:
    """Return why nothing can run here, None when it can."""
    try:
        import torch
    except ImportError as error:
        return f"{sys.executable} has no torch ({error}); name one that has (FXPRUNE_PYTHON=... make gpu)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA; use one that has it (FXPRUNE_PYTHON=... make gpu)"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    if find("nvcc") is None and not any((ROOT / "fxprune").glob("_C_cuda.so")):
        return "there is neither nvcc nor a built fxprune/_C_cuda.so"
    return None


def find(tool: str) -> str | None:
    """Return a tool of CUDA: from the environment (NVCC=..., CUDA_HOME=...), on the path, or where CUDA usually is."""
    named = os.environ.get(tool.upper(), tool).split()[0]
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    places = [Path(home) / "bin" / tool for home in homes if home]
    return shutil.which(named) or next((str(place) for place in places if place.is_file()), None)


def run_step(step: str, seconds: float, out: Path | None) -> list[str]:
    """Run one step within a time; return what failed."""
    if step == "build":
        nvcc = find("nvcc")
        if nvcc is None:
            print("gpu: build skipped, there is no nvcc; what was built before is used")
            return []
        build = ("setup.py", "--quiet", "build_ext", "--inplace", "egg_info")
        return call(step, seconds, *build, FXPRUNE_CUDA="1", NVCC=os.environ.get("NVCC", nvcc))
    if step == "tests":
        files = sorted(path.relative_to(ROOT) for path in (ROOT / "tests/gpu").glob("test_*.py"))
        return together(seconds, {path.stem: (*PYTEST, *WATCHED, str(path), "--durations=3") for path in files}, {})
    if step == "bench":
        place = () if out is None else ("--out", str(out.resolve() / "gpu.json"))
        return call(step, seconds, "benchmarks/bench_gpu.py", "--seconds", str(int(seconds - 10)), *place)
    tool = find("compute-sanitizer")
    if tool is None:
        print("gpu: sanitizer skipped, there is no compute-sanitizer")
        return []
    tests = (*PYTEST, "tests/gpu/test_small.py", "-x")
    prefixes = {name: (tool, "--tool", name, "--error-exitcode", "9", "--target-processes", "all") for name in SANITIZERS}
    return together(seconds, dict.fromkeys(SANITIZERS, tests), prefixes, PYTORCH_NO_CUDA_MEMORY_CACHING="1")


def together(
    seconds: float, jobs: dict[str, tuple[str, ...]], prefixes: dict[str, tuple[str, ...]], **environment: str
) -> list[str]:
    """Run jobs, two processors for each, within a time for all; return what failed.

    One whose test took too long (tests/gpu/watchdog.py) runs again without that test, while there is time.
    """
    end = time.monotonic() + seconds

    def run(name: str) -> list[str]:
        report, running, hung = REPORTS / f"{name}.log", REPORTS / f"{name}.running", list[str]()
        more = {"TORCHINDUCTOR_COMPILE_THREADS": "2", "FXPRUNE_RUNNING": str(running), **environment}
        while (left := end - time.monotonic()) >= 5:
            running.write_text("")
            skipped = [f"--deselect={test}" for test in hung]
            found = call(name, left, *jobs[name], *skipped, prefix=prefixes.get(name, ()), report=report, **more)
            test, _, stack = running.read_text(errors="replace").partition("\n")
            if "Timeout (" not in stack or test in hung:
                return [*(f"{one} hung" for one in hung), *found]
            print(f"gpu: {test} hung\n{stack}", flush=True)
            hung.append(test)
        return [*(f"{one} hung" for one in hung), f"{name} was not {'ended' if hung else 'begun'}, no time was left"]

    with ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 1) // 2)) as pool:
        return [problem for problems in pool.map(run, jobs) for problem in problems]


def call(
    name: str, seconds: float, *arguments: str, prefix: tuple[str, ...] = (), report: Path | None = None, **environment: str
) -> list[str]:
    """Run Python within a time; return what failed. What it says goes to ``report``, whose end is shown."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    caches = ROOT / "build/gpu-cache"  # a home folder may not be writable
    env = {
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "XDG_CACHE_HOME": str(caches),
        **os.environ,
        "PYTHONPATH": path,
        "TORCHINDUCTOR_COMPILE_THREADS": str(min(16, os.cpu_count() or 1)),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONUNBUFFERED": "1",
        **environment,
    }
    command = [*prefix, sys.executable, *arguments]
    output = None if report is None else report.open("w")
    begun = time.monotonic()
    errors = None if output is None else subprocess.STDOUT
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=output, stderr=errors, start_new_session=True)
    try:
        status = process.wait(timeout=seconds)
    except BaseException as stopped:  # also when this process is interrupted: its processes end with it
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(stopped, subprocess.TimeoutExpired):
            raise
        problems = [f"{name} ran past {seconds:.0f} s"]
    else:
        problems = [] if status == 0 else [f"{name} ended with {status}"]
    if output is not None and report is not None:
        output.close()
        show(name, report, time.monotonic() - begun, SHOWN if problems else 1)
    return problems


def show(name: str, report: Path, seconds: float, lines: int) -> None:
    text = report.read_text(errors="replace").splitlines()
    print("\n".join((f"gpu: {name}, {seconds:.0f} s ({report.relative_to(ROOT)})", *text[-lines:])), flush=True)


if __name__ == "__main__":
    sys.exit(main())
