"""The backend is found by its name: installed, or from a checkout after ``register()``."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

MODEL = """
import torch
model = torch.nn.Linear(8, 4).eval()
with torch.no_grad():
    model.weight[:, ::2] = 0
x = torch.ones(2, 8)
fast = torch.compile(model, backend="hwprune", options={"fallback": "eager", "autotune": "off"})
with torch.no_grad():
    assert torch.allclose(fast(x), model(x))
"""


def python(code: str, root: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, outside the checkout."""
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=root.anchor, text=True, capture_output=True, timeout=120
    )


def test_works_without_an_import(root: Path) -> None:
    if not any(e.name == "hwprune" for e in entry_points(group="torch_dynamo_backends")):
        pytest.skip("fxprune is not installed here")
    code = f"import sys\nassert 'fxprune' not in sys.modules{MODEL}assert 'fxprune' in sys.modules\nprint('right')"
    done = python(code, root)
    assert done.returncode == 0 and done.stdout.strip() == "right", done.stderr


def test_register_in_a_checkout_that_is_not_installed(root: Path) -> None:
    hide = "import importlib.metadata as m\nreal = m.entry_points\nm.entry_points = lambda **k: m.EntryPoints(())\n"
    code = f"{hide}import fxprune\nfxprune.register()\nfxprune.register()\n{MODEL}print('right')"
    done = python(code, root, PYTHONPATH=str(root))
    assert done.returncode == 0 and done.stdout.strip() == "right", done.stderr


def test_register_beside_the_entry_point(root: Path) -> None:
    """And nothing else is said by it, by the import, or by the compile."""
    code = f"import fxprune\nfxprune.register()\n{MODEL}fxprune.register()\nprint('right')"
    done = python(code, root, PYTHONPATH=str(root))
    assert done.returncode == 0 and done.stdout.strip() == "right" and done.stderr == "", done.stderr
