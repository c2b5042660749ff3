"""Shared set-up: private caches, two threads, hypothesis profiles, and imports of the benchmark modules.

Profiles: ``dev`` by default, ``nightly`` with FXPRUNE_FUZZ=<examples per property>.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHES = Path(tempfile.mkdtemp(prefix="fxprune-tests-"))

# before torch and fxprune are imported: both read these once
os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(CACHES / "inductor")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ["XDG_CACHE_HOME"] = str(CACHES / "xdg")
# Inductor tries every instruction set of the processor with the compiler first, 16 s for every new folder of caches.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# A thread that waits sleeps: with spinning, one busy neighbour on two cores makes every parallel region 100x slower.
# Waking costs time, so no test may expect one kernel to be faster than another.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# `from zoo import build` and `from tests.oracle import ...`, whatever folder pytest was started in
for folder in (ROOT, ROOT / "benchmarks"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import pytest  # noqa: E402
import torch  # noqa: E402
import torch._dynamo.guards  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

_SLOW_IS_FINE = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
_REPEATABLE = {"derandomize": True, "database": None, "print_blob": True}

settings.register_profile("dev", max_examples=50, **_SLOW_IS_FINE, **_REPEATABLE)
settings.register_profile(
    "nightly", max_examples=int(os.environ.get("FXPRUNE_FUZZ", "5000")), print_blob=True, **_SLOW_IS_FINE
)
settings.load_profile("nightly" if "FXPRUNE_FUZZ" in os.environ else "dev")

torch.set_num_threads(2)
# For its log alone, Dynamo flushes the caches of the processor and times each guard once: 20 ms of a small compile's 60.
torch._dynamo.guards.profile_guard_manager = lambda *_: 0.0
# pytest listens to every logger that does not propagate, and to a listener torch describes all that it compiles: 8 ms.
logging.getLogger("torch.__trace").addHandler = lambda _: None  # type: ignore[method-assign]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than ten seconds")
    config.addinivalue_line("markers", "fuzz: a property worth thousands of examples (make fuzz)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long tests first: none of them is left for the end, when the other processes have nothing more to do."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(CACHES, ignore_errors=True)


@pytest.fixture(params=("scalar", "avx2", "avx512"))
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this machine has."""
    before = torch.ops.fxprune.isa()
    try:
        torch.ops.fxprune.set_isa(request.param)
    except RuntimeError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    torch.ops.fxprune.set_isa(before)


@pytest.fixture
def root() -> Path:
    """The checkout."""
    return ROOT
