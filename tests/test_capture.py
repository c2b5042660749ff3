"""Capturing leaves nothing behind: not in the model, and not in Dynamo's limits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.ao.pruning import WeightNormSparsifier

import fxprune
from fxprune.capture import capture, detect, detect_exported
from fxprune.config import Config
from fxprune.errors import NothingToPrune
from tests.oracle import compiled, integer_model, integers, zero_some

X = integers(2, 8, 5, 5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dw, self.drop, self.pw = nn.Conv2d(8, 8, 3, groups=8), nn.Dropout(0.9), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pw(self.drop(self.dw(x)))


def test_many_models_of_one_class_are_captured() -> None:
    """More than Dynamo's limit of recompiles, which would run the next one uncaptured."""
    torch._dynamo.reset()
    for _ in range(torch._dynamo.config.recompile_limit + 4):
        result = fxprune.prune(integer_model(Net()), X, sparsity=0.5)
        assert [layer.name for layer in result.plan] == ["dw", "pw"]


def test_captures_do_not_use_up_the_users_recompiles() -> None:
    torch._dynamo.reset()
    model = zero_some(integer_model(Net()))
    for _ in range(torch._dynamo.config.recompile_limit + 4):
        capture(model, X)
    fast = compiled(model)
    with torch.no_grad():
        assert torch.equal(fast.call(X), model(X))
    assert len(fast.contexts) == 1


def test_detection_does_not_change_the_captured_graph() -> None:
    (graph,) = capture(Net(), X)
    before = graph.gm.code
    detect(graph, Config())
    assert graph.gm.code == before


def test_exported_programs_are_detected_without_warnings() -> None:
    program = torch.export.export(Net().eval(), (X,))
    assert [m.kind for m in detect_exported(program).matches] == ["depthwise", "pointwise"]
    assert [m.parameter for m in detect_exported(program).matches] == ["dw.weight", "pw.weight"]


def test_a_model_that_is_one_layer_is_pruned() -> None:
    seen = []
    for layer, x in ((nn.Linear(8, 64), X[0, 0, 0].new_ones(3, 8)), (nn.Conv2d(8, 8, 3, groups=8), X)):
        result = fxprune.prune(layer, x, sparsity=0.5, filter_fn=lambda module, name: seen.append(module) or True)
        assert (result.model.weight == 0).float().mean() >= 0.45
    assert [type(module) for module in seen] == [nn.Linear, nn.Conv2d]


def test_flags_of_every_submodule_are_restored() -> None:
    model = Net().train()
    model.drop.eval()
    capture(model, X)
    assert [m.training for m in (model, model.dw, model.drop, model.pw)] == [True, True, False, True]


def test_a_mask_of_torch_ao_is_named_with_the_remedy() -> None:
    """Dynamo skips the module it lives in, so the layer is in no graph, and a Sequential leaves none at all."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval()
    sparsifier = WeightNormSparsifier(sparsity_level=0.5, sparse_block_shape=(1, 4))
    sparsifier.prepare(model, [{"tensor_fqn": "0.weight"}])
    sparsifier.step()
    (row,) = fxprune.explain(model, torch.ones(2, 8)).to_dict()["rows"]
    assert row["layer"] == "0.weight" and row["shape"] == "8x8" and "squash_mask() writes the zeros" in row["decision"]
    with pytest.raises(NothingToPrune, match=r"0\.weight: a mask of torch\.ao\.pruning"):
        fxprune.prune(model, torch.ones(2, 8), sparsity=0.5)
    sparsifier.squash_mask()
    assert [r["layer"] for r in fxprune.explain(model, torch.ones(2, 8)).to_dict()["rows"]] == ["0"]
