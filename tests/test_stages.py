"""The graph before and after each pass as lines: complete, readable, and what a pass changed of them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxprune
from fxprune.errors import ConfigError
from fxprune.stages import Stage
from tests.toys import image, mlp, mobile, pruned, rows

TEXTS = st.lists(st.sampled_from("abcd"), max_size=8).map(tuple)


@given(before=TEXTS, after=TEXTS)
def test_changes_hold_both_graphs(before: tuple[str, ...], after: tuple[str, ...]) -> None:
    stage = Stage(1, "pass", before, after)
    changes = stage.changes()
    assert tuple(text for sign, text in changes if sign != "+") == before
    assert tuple(text for sign, text in changes if sign != "-") == after
    assert stage.counts[1] - stage.counts[0] == len(after) - len(before)


def test_each_stage_begins_where_the_one_before_ended() -> None:
    torch._dynamo.reset()
    (graph,) = fxprune.stages(pruned(mobile(), image(), granularity=8), image(), autotune="off", min_speedup=0.0)
    assert [s.number for s in graph] == sorted({s.number for s in graph}) and graph[0].name == "captured"
    assert graph[0].counts == (0, 0) and all(s.counts != (0, 0) for s in graph[1:])
    for a, b in pairwise(graph):
        assert a.after == b.before
    assert graph[0].after[0] == "conv2d (2, 16, 8, 8) float32 = conv2d(l_x_, dw.weight, None, (1, 1), (1, 1), (1, 1), 16)"
    last = graph[-1].after
    assert last[0].startswith("region_default = fxprune.region([l_x_], [") and last[0].endswith(", 4 steps, [4])")
    assert [line.split()[0] for line in last[1:4]] == ["depthwise", "gemm", "mean"]


def test_an_unpruned_model_has_no_region() -> None:
    torch._dynamo.reset()
    (graph,) = fxprune.stages(mlp(), rows(), autotune="off")
    assert [s.name for s in graph] == ["captured", "normalize"]
    assert not any("fxprune" in line for s in graph for line in s.after)


def test_a_target_is_refused() -> None:
    with pytest.raises(ConfigError, match="target_speedup"):
        fxprune.stages(mlp(), rows(), target_speedup=2.0)
