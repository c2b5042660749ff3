"""Attention is opened where it hides linear layers: the same values, and layers that prune, run sparse, have gradients."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.capture import capture, detect, detect_exported
from fxprune.config import Config
from fxprune.decisions import LAST_REPORTS
from tests.oracle import FORCED
from tests.sdgp import watched

FAST = torch._transformer_encoder_layer_fwd


class Encoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        with torch.no_grad():
            for parameter in self.parameters():  # biases and norms that are not 0 and 1
                parameter += torch.randn_like(parameter) * 0.1

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        return self.encoder(x, **masks)


class Attention(nn.Module):
    """One ``nn.MultiheadAttention``, of x to x or to a part of it."""

    def __init__(self, memory: int | None = None, weights: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True, kdim=memory, vdim=memory, **options)
        self.memory, self.weights = memory, weights

    def forward(self, x: Tensor, **masks: Any) -> Tensor:
        other = x if self.memory is None else x[:, 2:, : self.memory]
        y, weights = self.attention(x, other, other, need_weights=self.weights, **masks)
        return torch.cat([y, weights], -1) if self.weights else y


def tokens(batch: int = 4) -> Tensor:
    return torch.randn(batch, 16, 64, generator=torch.Generator().manual_seed(batch))


def linear_layers(model: nn.Module, *inputs: Any) -> set[str]:
    example: Any = inputs[0] if len(inputs) == 1 and isinstance(inputs[0], dict) else inputs
    return {match.name for graph in capture(model, example) for match in detect(graph, Config()).matches}


ENCODERS: dict[str, dict[str, Any]] = {
    "relu": {},
    "gelu": {"activation": "gelu"},
    "norm first": {"norm_first": True},
    "norm first, gelu": {"norm_first": True, "activation": "gelu", "layer_norm_eps": 1e-3},
}
IN_LAYER = ("self_attn", "self_attn.out_proj", "linear1", "linear2")
EVERY = {f"encoder.layers.{i}.{name}" for i in range(2) for name in IN_LAYER}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_an_encoder_prunes_and_runs_sparse(name: str, dynamic: bool) -> None:
    model = Encoder(**ENCODERS[name]).eval()
    assert linear_layers(model, tokens()) == EVERY
    result = fxprune.prune(model, tokens(), sparsity=0.75)
    assert {layer.name for layer in result.plan} == EVERY
    call = torch.compile(result.model, backend=fxprune.hwprune, options=FORCED)
    LAST_REPORTS.clear()
    with torch.no_grad():
        for batch in (4, 3):
            x = tokens(batch)
            if dynamic:
                torch._dynamo.mark_dynamic(x, 0)
            torch.testing.assert_close(call(x), result.model(x), rtol=1e-4, atol=1e-5)
    (decisions, *others) = [context.decisions for context in LAST_REPORTS]
    assert len(others) == (not dynamic)
    # what feeds relu alone loses channels, and with them the next layer's columns
    assert all(d.chosen or d.reason == "its zeros were cut out with their channels" for d in decisions)
    assert len(decisions) == 8 and sum(d.chosen for d in decisions) >= 6


def test_an_encoder_without_zeros_keeps_the_call_it_has() -> None:
    seen: list[Any] = []

    def look(gm: Any, inputs: Any) -> Any:
        seen.extend(node.target for node in gm.graph.nodes)
        return gm.forward

    model = Encoder().eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        torch.compile(model, backend=look)(tokens())
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, backend=fxprune.hwprune, options=FORCED)(tokens()), model(tokens()))
    assert seen.count(FAST) == 2 and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


ATTENTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "self": ({}, {}, {"attention", "attention.out_proj"}),
    "weights": ({"weights": True}, {}, {"attention", "attention.out_proj"}),
    "without biases": ({"bias": False}, {}, {"attention", "attention.out_proj"}),
    "mask": ({}, {"attn_mask": torch.ones(16, 16).triu(1).bool()}, {"attention", "attention.out_proj"}),
    "padding": ({}, {"key_padding_mask": torch.arange(16).expand(4, 16) > 12}, {"attention", "attention.out_proj"}),
    "zero attention": ({"add_zero_attn": True, "add_bias_kv": True}, {}, {"attention", "attention.out_proj"}),
    "cross": ({"memory": 32}, {}, {"attention", "attention.out_proj"}),
}


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("train", [False, True])
def test_attention_equals_eager(name: str, train: bool) -> None:
    options, masks, layers = ATTENTIONS[name]
    model = Attention(**options).train(train)
    inputs = {"x": tokens(), **masks}
    assert linear_layers(model, inputs) == layers
    result = fxprune.prune(model, inputs, sparsity=0.5)
    call = torch.compile(result.model, backend=fxprune.hwprune, options=FORCED)
    LAST_REPORTS.clear()
    with torch.set_grad_enabled(train):
        y, expected = call(**inputs), result.model(**inputs)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert any(decision.chosen for context in LAST_REPORTS for decision in context.decisions)
    if train:
        masked = [p for p in model.parameters() if p.dim() == 2]
        given = torch.autograd.grad(y.square().sum(), list(result.model.parameters()))
        right = torch.autograd.grad(expected.square().sum(), list(result.model.parameters()))
        for (key, parameter), a, b in zip(result.model.named_parameters(), given, right, strict=True):
            pruned = fxprune.plan.lookup(parameter)
            kept = torch.ones_like(parameter, dtype=torch.bool) if pruned is None else pruned.mask
            torch.testing.assert_close(a[kept], b[kept], rtol=1e-3, atol=1e-4, msg=key)
            assert not a[~kept].any()
        assert masked


def test_gradients_inside_attention_are_pruned() -> None:
    model, x = Encoder().train(), tokens().requires_grad_()
    call = torch.compile(model, backend=fxprune.hwprune, options={**FORCED, "grad_sparsity": "2:4"})
    with watched() as seen:
        call(x).square().sum().backward()
    assert seen.pruned == [8]
    rows = {row["layer"]: row["reason"] for row in fxprune.gradient_report().to_dict()["rows"]}
    assert rows == dict.fromkeys(EVERY, "")


def test_the_pruner_reaches_an_encoder_and_holds_its_masks() -> None:
    model = Encoder().train()
    pruner = fxprune.Pruner(model, tokens(), sparsity=0.75, schedule=fxprune.LinearSchedule(0, 4, 2), importance="taylor")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        model(tokens()).square().sum().backward()
        optimizer.step()
        pruner.step()
    masks = pruner.state_dict()["masks"]
    assert len(masks) == 8 and pruner.sparsity["all"] == pytest.approx(0.75, abs=0.03)
    assert not any(model.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_symbolic_numbers_say_why_it_stays_closed() -> None:
    model = fxprune.prune(Encoder().eval(), tokens(), sparsity=0.75).model
    LAST_REPORTS.clear()
    with torch.no_grad():
        call = torch.compile(model, backend=fxprune.hwprune, options=FORCED, dynamic=True)
        torch.testing.assert_close(call(tokens()), model(tokens()), rtol=1e-4, atol=1e-5)
    refused = [refusal for context in LAST_REPORTS for refusal in context.refused]
    assert len(refused) == 2 and all("dynamic=None" in refusal.reason for refusal in refused)


def test_an_exported_encoder_is_opened_too(tmp_path: Any) -> None:
    result = fxprune.prune(Encoder().eval(), tokens(), sparsity=0.75)
    written = fxprune.export(result.model, (tokens(),), tmp_path / "encoder.pt2", **FORCED)
    with torch.no_grad():
        torch.testing.assert_close(fxprune.load(written.path)(tokens()), result.model(tokens()), rtol=1e-4, atol=1e-5)
    program = torch.export.export(result.model, (tokens(),))
    with torch.no_grad():
        program = torch.export.export(result.model, (tokens(),))
    assert {match.name for match in detect_exported(program).matches} == EVERY


def test_the_fast_path_with_a_mask_says_why_it_stays_closed() -> None:
    model = Encoder().eval()
    inputs = {"x": tokens(), "src_key_padding_mask": torch.arange(16).expand(4, 16) > 12}
    refused = [refusal for graph in capture(model, inputs) for refusal in detect(graph, Config()).refused]
    assert {r.name for r in refused} == {"encoder.layers.0", "encoder.layers.1"}
    assert all("torch.backends.mha.set_fastpath_enabled(False)" in r.reason for r in refused)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert linear_layers(model, inputs) == EVERY
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_the_opened_layer_is_the_fast_path(heads: int) -> None:
    """Against torch's own kernel, layer by layer."""
    from fxprune.passes.open_attention import encoder_layer

    for options in ENCODERS.values():
        layer = Encoder(**options).eval().encoder.layers[0]
        attention = layer.self_attn
        args = (tokens(), 64, heads, attention.in_proj_weight, attention.in_proj_bias)
        args += (attention.out_proj.weight, attention.out_proj.bias, layer.activation is F.gelu, layer.norm_first)
        args += (layer.norm1.eps, layer.norm1.weight, layer.norm1.bias, layer.norm2.weight, layer.norm2.bias)
        args += (layer.linear1.weight, layer.linear1.bias, layer.linear2.weight, layer.linear2.bias)
        with torch.no_grad():
            torch.testing.assert_close(encoder_layer(*args), FAST(*args), rtol=1e-4, atol=1e-5)
