"""Inductor's caches: hit in a second process, never poisoned, and keyed on the kernels' code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch
from torch import nn
import fxprune
from torch._dynamo.utils import counters
fxprune.register()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
x = torch.randn(4, 32)
model = fxprune.prune(model, x, sparsity=0.5).model
if "other" in sys.argv:
    with torch.no_grad():
        model[0].weight.mul_(2)
expected = model(x).detach()
result = {}
for backend in [a for a in sys.argv[1:] if a in ("hwprune", "inductor")]:
    torch._dynamo.reset()
    counters.clear()
    options = {"autotune": "off", "min_speedup": 0.0} if backend == "hwprune" else None
    with torch.no_grad():
        y = torch.compile(model, backend=backend, options=options)(x)
    stats = counters["inductor"]
    result[backend] = {
        "error": (y - expected).abs().max().item(),
        "hits": stats["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"],
        "misses": stats["fxgraph_cache_miss"],
    }
print(json.dumps(result))
"""


def engines(cache: Path, root: Path, *names: str) -> dict[str, dict[str, float]]:
    """Compile with each engine in a fresh process that shares ``cache``."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], env=env, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert all(r["error"] < 1e-5 for r in result.values()), result
    return result


@pytest.mark.slow
def test_a_second_process_hits_the_caches_and_nothing_is_poisoned(tmp_path: Path, root: Path) -> None:
    first = engines(tmp_path, root, "inductor", "hwprune")
    assert first["inductor"]["hits"] == first["hwprune"]["hits"] == 0 and first["hwprune"]["misses"] == 1
    second = engines(tmp_path, root, "hwprune", "inductor")
    assert second["hwprune"]["hits"] > 0 and second["hwprune"]["misses"] == 0
    assert second["inductor"]["hits"] > 0
    engines(tmp_path, root, "hwprune", "other")


def test_the_salt_covers_the_sources_and_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxprune.lowering import codegen, library

    codegen._salt.cache_clear()
    first = codegen.Salt().uuid()
    assert first == codegen.Salt().uuid() and first.startswith("fxprune-")
    read = Path.read_bytes
    seen = []

    def changed(path: Path) -> bytes:
        seen.append(path.name)
        return read(path) + (b"#" if path.name == "tile_gemm.py" else b"")

    monkeypatch.setattr(Path, "read_bytes", changed)
    codegen._salt.cache_clear()
    second = codegen.Salt().uuid()
    monkeypatch.undo()
    assert second != first and {"tile_gemm.py", "depthwise_taps.py", "codegen.py", "cpu.py"} <= set(seen)
    monkeypatch.setattr(library, "source_hash", lambda: "another library")
    codegen._salt.cache_clear()
    assert codegen.Salt().uuid() not in (first, second)
    codegen._salt.cache_clear()


def test_the_salt_changes_no_graph() -> None:
    import torch
    from fxprune.lowering import codegen

    graph = torch.fx.symbolic_trace(torch.nn.Linear(2, 2)).graph
    before = str(graph)
    assert codegen.Salt()(graph) is None and str(graph) == before
