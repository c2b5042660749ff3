"""Random small models, pruned by plan or by hand: the rewritten graph computes the masked dense model, bit for bit.

``FXPRUNE_FUZZ=n`` runs n models; each failure prints the recipe that rebuilds it.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from fxprune.passes import FORWARD
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import fxprune
from fxprune.errors import NothingToPrune
from tests.oracle import (
    Mistrusted,
    assert_exact,
    assert_model,
    assert_same,
    compiled,
    integer_model,
    integers,
    rewritten,
    rounds,
    zero_some,
)
from tests.strategies import Built, Recipe, recipes

LONG = int(os.environ.get("FXPRUNE_FUZZ", "0"))
MODELS = LONG or 150
FUZZ = settings(
    max_examples=MODELS,
    deadline=None,
    derandomize=not LONG,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate),  # shrinking compiles hundreds of models; the recipe is small already
)
prunings = st.sampled_from(("dense", "plan", "by_hand", "rows", "rows"))


def build(recipe: Recipe, pruning: str) -> torch.nn.Module:
    """Return the model of a recipe with integer weights, pruned."""
    model = integer_model(Built(recipe), recipe.seed)
    if pruning == "plan":
        try:
            return fxprune.prune(model, inputs(recipe), sparsity=0.6, granularity=4, recalibration="off").model
        except NothingToPrune:
            return model
    if pruning == "by_hand":
        return zero_some(model, recipe.seed, share=0.5, step=1)
    return zero_some(model, recipe.seed, share=0.6, step=8) if pruning == "rows" else model


def inputs(recipe: Recipe) -> torch.Tensor:
    return integers(recipe.batch, recipe.channels, recipe.size, recipe.size, seed=recipe.seed)


@pytest.mark.fuzz
def test_rewritten_graph_equals_masked_dense_model() -> None:
    fired: Counter[str] = Counter()
    seen: Counter[str] = Counter()

    @FUZZ
    @given(recipes(), prunings)
    def run(recipe: Recipe, pruning: str) -> None:
        model, x = build(recipe, pruning), inputs(recipe)
        repro = f"build({recipe!r}, {pruning!r})"
        result = rewritten(model, x)
        seen["all"] += 1
        seen["exact"] += not rounds(result.expected, result.exact)
        try:
            assert_same(result.output, result.expected, result.exact, repro)
        except Mistrusted:
            seen["mistrusted"] += 1
            assert_exact(result.output, result.expected, repro, trusted=False)
        fired["any kernel"] += result.changed
        fired.update(p.__name__ for p in FORWARD if result.context.counts[p.__name__])
        fired["match_blocks"] += bool(result.context.blocks)
        if pruning == "dense":
            assert not result.changed or any(d.mask is not None for d in result.context.decisions), repro

    run()
    rates = {name: fired[name] / seen["all"] for name in sorted(fired)}
    print("\ngraphs:", dict(seen), "trigger rates:", {name: f"{rate:.0%}" for name, rate in rates.items()})
    assert seen["exact"] >= 0.8 * seen["all"] and seen["mistrusted"] <= 0.2 * seen["all"], seen
    assert rates["any kernel"] >= 0.3, rates
    least = {"fold_batchnorm": 0.2, "match_blocks": 0.2, "rewrite_depthwise": 0.3, "rewrite_gemm": 0.3}
    least |= {"fuse_transpose": 0.02, "fuse_gate": 0.02, "fuse_epilogue": 0.2}
    for name, rate in least.items():
        assert rates.get(name, 0.0) >= rate, f"{name} fired on too few graphs: {rates}"


@settings(FUZZ, max_examples=max(10, MODELS // 10))
@given(recipes(3), st.sampled_from(("plan", "rows")))
def test_compiled_model_equals_masked_dense_model(recipe: Recipe, pruning: str) -> None:
    torch._dynamo.reset()
    model, x = build(recipe, pruning), inputs(recipe)
    fast = compiled(model)
    with torch.no_grad():
        for _ in range(2):
            assert_model(fast.call(x), model, (x,), f"build({recipe!r}, {pruning!r})", trusted=False)
