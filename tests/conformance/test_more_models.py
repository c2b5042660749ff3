"""More architectures, compiled once: equal to eager without zeros, then pruned in place and equal to the masked model."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

import fxprune
from tests.conformance.family import Recorded, double, run
from tests.oracle import assert_close_fp64, assert_exact

TABLE: dict[str, dict[str, Any]] = json.loads((Path(__file__).parent / "matches.json").read_text())
NAMES = sorted((*zoo.TIMM, *zoo.TRANSFORMERS))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_then_pruned(name: str) -> None:
    torch._dynamo.reset()
    model, batch = zoo.build(name)
    args = tuple(t[..., :64, :64] if t.dim() == 4 else t for t in batch(2))
    hwprune = Recorded(model)
    assert_exact(run(hwprune.call, *args), run(model, *args), name)
    assert not hwprune.decisions
    detect = {"graphs": len(hwprune.graphs), "matches": dict(hwprune.kinds), "blocks": dict(hwprune.blocks)}

    result = fxprune.prune(model, args, sparsity=0.75, inplace=True)
    given = run(hwprune.call, *args)
    assert_close_fp64(given, run(model, *args), double(model, *args), tolerance=1e-4, repro=name)
    left = {d.match.name: d.reason for d in hwprune.decisions if not d.chosen}
    assert all("channels-last" in reason or "cut out" in reason for reason in left.values()), left
    assert len(result.plan) <= len(hwprune.decisions)
    pruned = dict(Counter(d.kernel for d in hwprune.decisions))
    found = {"detect": detect, "pruned": pruned}
    assert found == TABLE[name], f"{name}: {json.dumps(found)}"
