"""fxprune.prune with the pattern "channel": which filters go together, which stay and why, and that zeros hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.errors import NothingToPrune
from fxprune.plan import lookup
from tests.oracle import Run, assert_model, check, compiled, integer_model, integers

X = integers(2, 8, 8, 8, seed=7)
CHANNEL: dict[str, Any] = {"sparsity": {"pointwise": 0.5}, "pattern": {"pointwise": "channel"}}
DENSE: dict[str, Any] = {"min_speedup": 100.0}


def pointwise(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))


def depthwise(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False), nn.BatchNorm2d(channels))


class Gate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 16, 1), nn.Conv2d(16, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * F.hardsigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))))


class Inverted(nn.Module):
    """PW1, DW, squeeze-and-excite, PW2 and a residual."""

    def __init__(self, inputs: int, wide: int, outputs: int) -> None:
        super().__init__()
        self.pw1, self.dw, self.se, self.pw2 = pointwise(inputs, wide), depthwise(wide), Gate(wide), pointwise(wide, outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pw2(self.se(F.relu6(self.dw(F.relu6(self.pw1(x))))))
        return x + y if x.shape == y.shape else y


class Mobile(nn.Module):
    """MobileNetV2's plan: a stem, the first block without PW1, a residual stage, the head and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 16, 3, padding=1)
        self.dw, self.pw2 = depthwise(16), pointwise(16, 24)
        self.enter, self.stay = Inverted(24, 32, 32), Inverted(32, 40, 32)
        self.head, self.classifier = pointwise(32, 48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pw2(F.relu6(self.dw(F.relu6(self.stem(x)))))
        y = F.relu6(self.head(self.stay(self.enter(y))))
        return self.classifier(F.dropout(F.adaptive_avg_pool2d(y, 1).flatten(1), training=self.training))


def mobile(seed: int = 0) -> Mobile:
    return integer_model(Mobile(), seed)  # type: ignore[return-value]


def cut(run: Run) -> dict[str, tuple[int, int]]:
    return {layer: (s.before, s.after) for s in run.context.shrunk for layer in s.layers}


def dead(tensor: Tensor) -> set[int]:
    return set((tensor.flatten(1) == 0).all(1).nonzero().flatten().tolist())


def test_deprunes_rule() -> None:
    result = fxprune.prune(mobile(), X, **CHANNEL)
    summary = result.report.summary
    assert summary["channels"].startswith("56 of 104 filters of 3 group(s)")  # 24 -> 8, 32 -> 16, 48 -> 24
    (kept,) = [names for reason, names in summary.items() if "depthwise" in reason]
    assert kept == "enter.pw1.0; stay.pw1.0"
    model = result.model
    gone = {name: dead(module.weight) for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    assert len(gone["enter.pw2.0"]) == 16 and gone["enter.pw2.0"] == gone["stay.pw2.0"]  # one keep set
    assert len(gone["pw2.0"]) == 16 and len(gone["head.0"]) == 24
    assert not any(gone[n] for n in gone if ".se." in n or "pw1" in n or "dw" in n or n == "stem")
    for conv, norm, reader in (
        ("pw2.0", model.pw2[1], model.enter.pw1[0]),
        ("stay.pw2.0", model.stay.pw2[1], model.head[0]),
        ("head.0", model.head[1], model.classifier),
    ):
        at = sorted(gone[conv])
        assert not norm.weight[at].any() and not norm.bias[at].any() and not reader.weight[:, at].any()
        assert reader.weight.any() and not reader.weight.flatten(1)[:, at].any()
    by_name = {layer.name: layer for layer in result.plan}
    assert by_name["pw2.0"].note == "8 of 24 filters" and by_name["stay.pw1.0"].note == "16 of 32 inputs"
    assert by_name["head.0"].sparsity == 0.75 and by_name["classifier"].sparsity == 0.5
    run = check(model, X, **DENSE)
    assert set(cut(run).values()) == {(24, 8), (32, 16), (48, 24)}
    assert run.ops == check(mobile(), X, **DENSE).ops  # the same operators, smaller


def test_residual_groups_sum_their_scores() -> None:
    model = mobile()
    energy = model.enter.pw2[0].weight.flatten(1).square().sum(1) + model.stay.pw2[0].weight.flatten(1).square().sum(1)
    result = fxprune.prune(model, X, **CHANNEL)
    gone = dead(result.model.stay.pw2[0].weight)
    worst = energy[sorted(gone)].max()
    assert worst <= energy[[i for i in range(32) if i not in gone]].min()


@pytest.mark.parametrize("score", ["l1", "l2", "fpgm"])
def test_every_score_gives_the_same_counts(score: str) -> None:
    result = fxprune.prune(mobile(), X, channel_score=score, **CHANNEL)
    assert result.report.summary["channels"].startswith("56 of 104")


def test_without_recalibration_counts_are_exact() -> None:
    result = fxprune.prune(mobile(), X, recalibration="off", sparsity={"pointwise": 0.3}, pattern={"pointwise": "channel"})
    assert len(dead(result.model.pw2[0].weight)) == 7 and len(dead(result.model.head[0].weight)) == 14
    check(result.model, X, **DENSE)


def test_mobilenet_v1_has_nothing_to_prune() -> None:
    layers = [nn.Conv2d(8, 16, 3), depthwise(16), pointwise(16, 32), nn.ReLU6(), depthwise(32), pointwise(32, 24)]
    model = integer_model(nn.Sequential(*layers))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        NothingToPrune, match=r"2\.0: it feeds a depthwise convolution .*; 5\.0: its channels reach an output"
    ):
        fxprune.prune(model, X, inplace=True, **CHANNEL)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


class Feedforward(nn.Module):
    """ConvNeXt's block and a transformer's: the hidden width is free, the stream is read by norms."""

    def __init__(self) -> None:
        super().__init__()
        self.dw, self.norm = depthwise(8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 32), nn.Linear(32, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(F.gelu(self.up(self.norm(self.dw(x).permute(0, 2, 3, 1)))))
        x = x + y.permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


def test_hidden_widths_of_linear_layers() -> None:
    torch.manual_seed(0)
    result = fxprune.prune(Feedforward().eval(), X, sparsity=0.5, pattern="channel")
    assert [layer.note for layer in result.plan] == ["16 of 32 filters", "16 of 32 inputs"]
    assert cut(check(result.model, X, **DENSE)) == {"up": (32, 16)}


def test_coupled_layers_are_asked_for_together() -> None:
    options = {**CHANNEL, "ignored_layers": ("stay.pw2.0",)}
    result = fxprune.prune(mobile(), X, **options)
    reasons = result.report.summary
    (names,) = [v for k, v in reasons.items() if "coupled with stay.pw2.0.weight" in k]
    assert names == "enter.pw2.0" and not dead(result.model.enter.pw2[0].weight)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(8, 32, 1), nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.a(x))) + self.last(F.relu6(self.b(x)))


def test_a_weight_used_twice_keeps_its_channels() -> None:
    with pytest.raises(NothingToPrune, match=r"last\.weight is used more than once"):
        fxprune.prune(Shared().eval(), X, **CHANNEL)


def test_compiling_does_not_prune_channels() -> None:
    fast = compiled(mobile(), **CHANNEL)
    with pytest.raises(Exception, match=r"ConfigError.*before compiling"), torch.no_grad():
        fast.call(X)


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
])  # fmt: skip
def test_hold_keeps_weights_norms_and_biases_at_zero(make: Any) -> None:
    torch.manual_seed(0)
    model = fxprune.prune(Mobile(), X, **CHANNEL).model
    plan = fxprune.prune(model, X, sparsity={"depthwise": 0.6}, inplace=True).plan
    held = {name: p == 0 for name, p in model.named_parameters() if lookup(p) is not None}
    assert {"pw2.1.weight", "pw2.1.bias", "head.1.bias", "classifier.weight", "dw.0.weight"} <= set(held)
    optimizer = make(model.parameters())
    plan.hold(optimizer)
    for step in range(3):
        loss = model.train()(integers(4, 8, 8, 8, seed=step)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    parameters = dict(model.named_parameters())
    moved = [name for name, zeros in held.items() if parameters[name][zeros & ~lookup(parameters[name]).mask].any()]  # type: ignore[union-attr]
    assert not moved and parameters["pw2.1.bias"].count_nonzero() == 8
    assert set(cut(check(model.eval(), X, **DENSE)).values()) == {(24, 8), (32, 16), (48, 24)}


@pytest.mark.parametrize("order", [("channel", "dcp", "tile"), ("dcp", "channel", "tile"), ("tile", "channel", "dcp")])
def test_patterns_add_up(order: tuple[str, ...]) -> None:
    calls: dict[str, dict[str, Any]] = {
        "channel": CHANNEL,
        "dcp": {"sparsity": {"depthwise": 0.75}},
        "tile": {"sparsity": {"pointwise": 0.8}},
    }
    model = mobile()
    for name in order:
        before = {n: p == 0 for n, p in model.named_parameters() if p.dim() > 1 and lookup(p) is not None}
        model = fxprune.prune(model, X, **calls[name]).model
        after = dict(model.named_parameters())
        assert not any(after[n][zeros].any() for n, zeros in before.items())
    run = check(model, X)
    assert set(cut(run).values()) >= {(24, 8), (32, 16), (48, 24)}
    assert run.ops["depthwise_taps"] == 3 and run.ops["tile_gemm"] == 11
    assert run.ops["tile_conv"] == 1 and not run.ops["conv2d"], "the stem joins its feature-major region"
    patterns = {d.match.name: d.pattern for d in run.context.decisions}
    assert patterns["dw.0"] == "dcp" and {"channel", "tile"} == set(patterns["stay.pw1.0"].split("+"))
    plan = {d.match.name: d.mask for d in run.context.decisions if d.mask is not None}
    assert plan["stay.pw1.0"].mask.shape == (40, 16)


def test_tile_after_channel_loses_what_the_whole_weight_was_asked_for() -> None:
    model = fxprune.prune(mobile(), X, **CHANNEL).model
    result = fxprune.prune(model, X, sparsity={"stay.pw1.0": 0.75, "head.0": 0.5})
    by_name = {layer.name: layer for layer in result.plan}
    assert abs(by_name["stay.pw1.0"].sparsity - 0.75) < 0.04 and by_name["stay.pw1.0"].pattern == "channel+tile"
    assert by_name["head.0"].sparsity == 0.75  # it has lost more already


def test_training_computes_the_masked_model() -> None:
    model = fxprune.prune(mobile(), X, **CHANNEL).model
    fast = compiled(model)
    with torch.enable_grad():
        assert_model(fast.call(X).detach(), model, (X,))
    assert all(not c.shrunk for c in fast.contexts)


def test_explain_says_what_was_cut_out() -> None:
    model = fxprune.prune(mobile(), X, **CHANNEL).model
    summary = fxprune.explain(model, X, autotune="off").summary
    assert summary["cut out"].startswith("104 -> 48 channels (") and "head.0 48 -> 24" in summary["cut out"]
