"""Recurrent models through prune, explain and ``torch.compile(backend="hwprune")``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import fxprune
from tests.oracle import FORCED, assert_model, compiled, zero_some


class Translator(nn.Module):
    """The shape of GNMT in small: a bidirectional layer and another one encode, two layers decode with dot attention."""

    def __init__(self, size: int, words: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, size)
        self.first = nn.LSTM(size, size // 2, bidirectional=True, batch_first=True)
        self.encoder = nn.LSTM(size, size, 2, batch_first=True, dropout=0.1)
        self.decoder = nn.LSTM(size, size, 2, batch_first=True)
        self.head = nn.Linear(2 * size, words)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, states = self.encoder(self.first(self.embed(source))[0])
        query, _ = self.decoder(self.embed(target), states)
        context = torch.softmax(query @ memory.transpose(1, 2), -1) @ memory
        return self.head(torch.cat((query, context), -1))


class Tagger(nn.Module):
    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM, layers: int = 1) -> None:
        super().__init__()
        self.rnn = kind(16, 24, layers)
        self.head = nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def tagger(kind: type[nn.RNNBase] = nn.LSTM, layers: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return Tagger(kind, layers).eval()


@pytest.fixture(autouse=True)
def recurrent_graphs() -> Iterator[None]:
    """Restore what ``prune`` switches on, and forget frames that were traced without it."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


def words(*shape: int) -> Tensor:
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(1))


def run(call: Any, *inputs: Any) -> Any:
    with torch.no_grad():
        return call(*inputs)


def test_a_translator_of_the_usual_size() -> None:
    torch.manual_seed(0)
    source, target = words(2, 7), words(2, 5)
    result = fxprune.prune(Translator(512).eval(), (source, target), sparsity={"rnn": 0.75})
    assert len(result.plan) == 12 and result.sparsity["rnn"] == pytest.approx(0.75, abs=0.005)
    fast = compiled(result.model)
    assert_model(run(fast.call, source, target), result.model, (source, target))
    (context,) = fast.contexts
    assert context.counts["rewrite_rnn"] == 5
    assert context.counts["rnn_steps=cpu"] == 6 and context.counts["tile_gemm=cpu"] == 6


@pytest.mark.parametrize("kind", (nn.LSTM, nn.GRU))
def test_pruned_while_compiling(kind: type[nn.RNNBase]) -> None:
    model, x = tagger(kind), torch.randn(5, 3, 16)
    expected = fxprune.prune(model, x, sparsity={"rnn": 0.6}).model
    fast = compiled(model, sparsity={"rnn": 0.6})
    assert_model(run(fast.call, x), expected, (x,))
    assert fast.contexts[0].counts["rewrite_rnn"] == 1


@pytest.mark.parametrize("kind", (nn.LSTM, nn.GRU))
def test_weights_that_change_after_compile(kind: type[nn.RNNBase]) -> None:
    model, x = fxprune.prune(tagger(kind, 2), torch.randn(5, 3, 16), sparsity=0.6).model, torch.randn(5, 3, 16)
    fast = compiled(model)
    run(fast.call, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)
    assert_model(run(fast.call, x), model, (x,), "new values")
    with torch.no_grad():
        model.rnn.weight_hh_l1.add_(0.01)  # type: ignore[operator]
        model.rnn.weight_ih_l0[:, 3] = 0  # type: ignore[index]
    assert_model(run(fast.call, x), model, (x,), "new places of zeros")


def test_lengths_and_batches_change() -> None:
    model = zero_some(tagger(nn.LSTM, 2))
    fast = compiled(model, dynamic=True)
    for steps, batch in ((5, 3), (9, 2), (2, 7), (31, 4)):
        x = torch.randn(steps, batch, 16)
        assert_model(run(fast.call, x), model, (x,), f"{steps} steps, batch {batch}")
    assert len(fast.graphs) == 1 and fast.contexts[0].counts["rewrite_rnn"] == 2


def test_with_inductor() -> None:
    model, x = zero_some(tagger(nn.LSTM)), torch.randn(5, 3, 16)
    fast = torch.compile(model, backend=fxprune.hwprune, options={**FORCED, "fallback": "inductor"})
    assert_model(run(fast, x), model, (x,))


def test_a_dense_gru_is_not_unrolled_by_inductor() -> None:
    """Compiled by Inductor, 200 steps would take minutes."""
    model, x = tagger(nn.GRU), torch.randn(200, 2, 16)
    fast = torch.compile(model, backend=fxprune.hwprune)
    assert torch.equal(run(fast, x), run(model, x))
    zero_some(model.head)  # type: ignore[arg-type]
    torch._dynamo.reset()
    fast = torch.compile(model, backend=fxprune.hwprune, options={**FORCED, "fallback": "inductor"})
    assert_model(run(fast, x), model, (x,))


def test_training_keeps_the_dense_weights() -> None:
    x = torch.randn(5, 3, 16)
    result = fxprune.prune(tagger(), x, sparsity={"rnn": 0.6})
    model = result.model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    result.plan.hold(optimizer)
    fast = compiled(model)
    fast.call(x).square().sum().backward()
    optimizer.step()
    assert fast.contexts == []
    weight = model.rnn.weight_hh_l0  # type: ignore[union-attr]
    assert (weight == 0).float().mean().item() == pytest.approx(0.6, abs=0.02)
    model.eval()
    assert_model(run(fast.call, x), model, (x,))
    assert fast.contexts[-1].counts["rewrite_rnn"] == 1


def test_names_and_globs() -> None:
    x = torch.randn(5, 3, 16)
    for asked, pruned in (
        ({"rnn": 0.5}, ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]),  # the kind
        ({"*": 0.5, "*weight_hh*": 0.0}, ["head.weight", "rnn.weight_ih_l0"]),
        ({"rnn.weight_hh_l0": 0.5}, ["rnn.weight_hh_l0"]),
    ):
        plan = fxprune.prune(tagger(), x, sparsity=asked).plan
        assert sorted(layer.parameter for layer in plan) == sorted(pruned)
    encoder = nn.ModuleDict({"encoder": tagger()})
    encoder.forward = encoder["encoder"].forward  # type: ignore[method-assign]
    plan = fxprune.prune(encoder, x, sparsity={"encoder.rnn": 0.5}).plan
    assert [layer.name for layer in plan] == ["encoder.rnn.weight_ih_l0", "encoder.rnn.weight_hh_l0"]
    assert len(fxprune.prune(tagger(), x, sparsity=0.5, ignored_layers=("rnn",)).plan) == 1


def test_prune_switches_on_what_dynamo_needs() -> None:
    torch._dynamo.config.allow_rnn = False
    x = torch.randn(5, 3, 16)
    model = zero_some(tagger())
    rows = fxprune.explain(model, x, autotune="off", min_speedup=0.0).to_dict()["rows"]
    assert ["allow_rnn = True" in row["decision"] for row in rows] == [False, True, True]
    fxprune.prune(model, x, sparsity={"linear": 0.5})
    assert not torch._dynamo.config.allow_rnn
    fxprune.prune(model, x, sparsity={"rnn": 0.5})
    assert torch._dynamo.config.allow_rnn


def test_explain_names_what_stays_dense() -> None:
    rows = fxprune.explain(nn.Sequential(nn.RNN(8, 12)).eval(), torch.randn(3, 2, 8)).to_dict()["rows"]
    assert [(r["layer"], r["kind"], r["kernel"]) for r in rows] == [("0", "rnn", "dense")]
    assert rows[0]["decision"] == "plain nn.RNN has no kernel, only LSTM and GRU have"
    pruned = fxprune.prune(tagger(), torch.randn(3, 2, 16), sparsity={"rnn": 0.5}).model
    with pytest.raises(BackendCompilerFailed, match=r"RequireSparse.*2 pruned.*its layer reaches"):
        run(compiled(pruned, require_sparse=True, min_speedup=100.0).call, torch.randn(3, 2, 16))


def test_measured(tmp_path: Any) -> None:
    model, x = zero_some(tagger(nn.GRU)), torch.randn(3, 2, 16)
    for _ in range(2):  # timed, then read from the cache
        report = fxprune.explain(model, x, autotune="fast", cache_dir=str(tmp_path))
        (row,) = [r for r in report.to_dict()["rows"] if r["layer"] == "rnn.weight_hh_l0"]
        assert float(row["kernel us"]) > 0 and float(row["dense us"]) > 0 and "predicted" not in row["decision"]
