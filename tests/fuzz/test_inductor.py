"""A few models of the fuzzer's grammar through the real Inductor, in inference, twice, under two batch sizes."""

from __future__ import annotations

import pytest
import torch

from tests.oracle import assert_model, compiled, integer_model, integers, zero_some
from tests.strategies import Built, Recipe, Step

RECIPES = {
    "gated": Recipe((Step("gated", 8, 3, 1, "relu6"), Step("pw", 17, act="relu")), 8, 8, 2, 1),
    "channels_last": Recipe((Step("channels_last", 9, 5), Step("dwsep", 8, 3, 2, "relu_")), 12, 8, 2, 2),
    "near misses": Recipe((Step("dwsep", 8, miss="extra_user"), Step("inverted", 8, miss="mutation")), 8, 8, 2, 3),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_inductor_computes_the_masked_dense_model(name: str) -> None:
    torch._dynamo.reset()
    recipe = RECIPES[name]
    model = zero_some(integer_model(Built(recipe), recipe.seed), recipe.seed)
    fast = compiled(model, fallback="inductor")
    with torch.no_grad():
        for batch in (2, 2, 3, 5):
            x = integers(batch, recipe.channels, recipe.size, recipe.size, seed=batch)
            assert_model(fast.call(x), model, (x,), f"{recipe!r} batch {batch}")
    assert fast.contexts and any(d.chosen for d in fast.contexts[-1].decisions)
