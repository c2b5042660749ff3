"""``fxprune.verify`` passes right models and catches wrong ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import VerificationError
from tests.oracle import FORCED
from tests.toys import image, mlp, mobile, pruned, rows


def test_a_right_model_passes_with_its_errors() -> None:
    fxprune.register()
    table = fxprune.verify(pruned(mobile(), image()), image(), **FORCED)
    ((output, shape, eager, ours),) = table.rows
    assert output == 0 and shape == (2, 24) and float(eager) < 1e-6 and float(ours) < 1e-6


WRONG: dict[str, tuple[Any, str]] = {
    "values": (lambda y: y + 0.01 * y.abs().max(), r"output 0: got error 0.01, expected at most 0.001"),
    "one value": (lambda y: y + 0.1 * y.abs().max() * (torch.arange(16) == 3), "got error 0.1"),
    "NaN": (lambda y: y * float("nan"), "got error nan"),
    "shape": (lambda y: y[:, :8], r"got torch.float32 \(4, 8\), expected torch.float32 \(4, 16\)"),
    "dtype": (lambda y: y.double(), "got torch.float64"),
    "number of outputs": (lambda y: (y, y), "got 2 tensors, expected 1 tensors"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_model_is_caught(name: str) -> None:
    model = pruned(mlp(), rows())
    spoil, message = WRONG[name]
    with pytest.raises(VerificationError, match=message):
        fxprune.verify(model, rows(), compiled=lambda x: spoil(model(x)))


def test_the_bound_is_the_tolerance() -> None:
    model = pruned(mlp(), rows())

    def off(x: Tensor) -> Tensor:
        y = model(x)
        return y + 0.05 * y.abs().max()

    assert fxprune.verify(model, rows(), compiled=off, tolerance=0.06).rows
    with pytest.raises(VerificationError):
        fxprune.verify(model, rows(), compiled=off, tolerance=0.04)


def test_integer_outputs_must_be_equal() -> None:
    class Label(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            y = self.net(x)
            return {"logits": y, "label": y.argmax(1)}

    model = Label().eval()
    assert len(fxprune.verify(model, rows(), compiled=model).rows) == 2
    with pytest.raises(VerificationError, match="output 1"):
        fxprune.verify(model, rows(), compiled=lambda x: {"logits": model(x)["logits"], "label": model(x)["label"] + 1})


def test_the_model_is_left_as_it_was() -> None:
    model = mobile().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fxprune.verify(model, image(), compiled=model)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.dw.weight.dtype == torch.float32


def test_verify_inside_compile_catches_a_wrong_rewrite(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxprune import pipeline

    def wrong(gm: torch.fx.GraphModule, ctx: Any) -> int:
        node = next(n for n in gm.graph.nodes if "tile_gemm" in str(n.target))
        node.update_arg(5, None)  # the bias is lost
        return 1

    monkeypatch.setattr(pipeline, "FORWARD", (*pipeline.FORWARD, wrong))
    fxprune.register()
    torch._dynamo.reset()
    fast = torch.compile(pruned(mlp(), rows()), backend="hwprune", options={**FORCED, "verify": True})
    with pytest.raises(Exception, match=r"rewrite: output differs: got .* expected at most 0\.001"), torch.no_grad():
        fast(rows())
