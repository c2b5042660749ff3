"""Where a result comes from: processor, versions, commit; and whether the processor was ours alone while it was taken."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
# never map large blocks, never trim: freed memory is reused
ENVIRONMENT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40)}


def machine() -> dict[str, Any]:
    """Return the processor's name and cores, and a folder name made of them."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = [x.partition(":")[2].strip() for x in info.read_text().splitlines() if x.startswith("model name")]
        name = lines[0] if lines else name
    cores = os.cpu_count() or 1
    words = "".join(c if c.isalnum() else " " for c in name.lower().replace("(r)", " ").replace("(tm)", " ")).split()
    flags = [f for f in ("amx_bf16", "avx512f", "avx2") if info.is_file() and f" {f}" in info.read_text()]
    return {
        "cpu": name,
        "cores": cores,
        "isa": flags[:1],
        "system": platform.system(),
        "slug": "-".join([*words, f"{cores}c"]),
    }


def versions() -> dict[str, str]:
    import torch

    import fxprune

    return {"python": platform.python_version(), "torch": torch.__version__, "fxprune": fxprune.__version__}


def commit() -> str:
    """Return the commit the sources are at, with a + when they differ from it; "none" outside a repository."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def origin() -> dict[str, Any]:
    """Return what every record says of where and when it was measured."""
    return {"machine": machine(), "versions": versions(), "date": f"{datetime.date.today()}", "commit": commit()}


def own_environment() -> None:
    """Start this process anew with ENVIRONMENT, which glibc reads when a process starts."""
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})


class Gate:
    """Tells whether a fixed amount of arithmetic on all threads runs as fast as it ever did here.

    slack: how much slower than the fastest run so far still counts as undisturbed.
    """

    def __init__(self, slack: float = 1.2) -> None:
        import torch

        self._slack = slack
        self._x = torch.ones(512, 512)
        self._best = min(self._milliseconds() for _ in range(20))
        self.disturbed = 0

    def __call__(self) -> bool:
        milliseconds = min(self._milliseconds() for _ in range(3))
        self._best = min(self._best, milliseconds)
        undisturbed = milliseconds <= self._slack * self._best
        self.disturbed += not undisturbed
        return undisturbed

    def gflops(self) -> float:
        """The fastest run, in GFLOP/s."""
        return 2 * 512**3 * 4 / self._best / 1e6

    def _milliseconds(self) -> float:
        start = time.perf_counter()
        for _ in range(4):
            self._x @ self._x
        return (time.perf_counter() - start) * 1e3
