"""A part of the simulated kernels under the address and undefined-behaviour sanitizers; `make cuda-check` runs all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PART = "test_rule or (mistakes and NO_BARRIER) or test_wgmma or many_images or larger_than or test_transpose"


@pytest.mark.slow
def test_kernels_under_sanitizers() -> None:
    if os.environ.get("FXPRUNE_SANITIZE") == "1":
        pytest.skip("the sanitizers are on already")
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler")
    env = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(["bash", "tests/cuda/sanitize.sh", "-k", PART], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout or "100%" in done.stdout
