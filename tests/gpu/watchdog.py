"""A pytest plugin of tools/gpu.py: a test that takes too long ends its process, and a file says which one and where.

A kernel that waits for ever cannot be interrupted; with its process it goes. Environment: FXPRUNE_RUNNING, the file. Its
first line is the test that runs; the stack follows when it ran too long.
"""

from __future__ import annotations

import faulthandler
import os

import pytest

SECONDS, SLOW_SECONDS = 40.0, 120.0  # slow: those marked so, which compile models
_open: list[int] = []  # what the stack is written to


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    for file in _open:
        os.close(file)
    _open[:] = [os.open(os.environ["FXPRUNE_RUNNING"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)]
    os.write(_open[0], f"{item.nodeid}\n".encode())
    seconds = float(os.environ.get("FXPRUNE_TEST_SECONDS", SLOW_SECONDS if item.get_closest_marker("slow") else SECONDS))
    faulthandler.dump_traceback_later(seconds, exit=True, file=_open[0])  # pytest cancels it behind the test
