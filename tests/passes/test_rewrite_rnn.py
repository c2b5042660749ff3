"""LSTM and GRU calls: what matches, what is refused, and the rewritten graph against torch's own call."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fxprune import pipeline
from fxprune.capture import capture, detect
from fxprune.config import Config
from tests.oracle import FORCED, Run, assert_same, detected, rewritten, tensors, widened, zero_some

RNNS = (nn.LSTM, nn.GRU)


class Around(nn.Module):
    """A recurrent layer, and which of its results are used."""

    def __init__(self, layer: nn.RNNBase, use: str = "all") -> None:
        super().__init__()
        self.rnn = layer
        self.use = use

    def forward(self, x: Tensor, *states: Tensor) -> Any:
        given: Any = (states if len(states) == 2 else states[0]) if states else None
        out, final = self.rnn(x, given)
        if self.use == "last":
            return final[0] if isinstance(final, tuple) else final
        return out if self.use == "out" else (out, final)


def around(kind: type[nn.RNNBase], *sizes: int, use: str = "all", share: float = 0.6, **options: Any) -> Around:
    torch.manual_seed(sum(sizes))
    model = Around(kind(*sizes, **options), use).eval()
    return zero_some(model, share=share)  # type: ignore[return-value]


def check(model: nn.Module, *inputs: Any, **options: Any) -> Run:
    """Rewrite and compare; the graph itself makes float32 states, so the fp64 run is the model's."""
    with torch.no_grad():
        expected, exact = tensors(model(*inputs)), tensors(copy.deepcopy(model).double()(*widened(list(inputs))))
    run = rewritten(model, *inputs, exact=exact, **options)
    assert [(t.shape, t.stride()) for t in tensors(run.output)] == [(t.shape, t.stride()) for t in expected]
    assert_same(run.output, expected, exact, str(model), trusted=False)
    return run


def reasons(model: nn.Module, *inputs: Any) -> list[tuple[str, str]]:
    found = [detect(graph, Config()) for graph in capture(model, inputs)]
    assert not any(m.kind == "rnn" for ctx in found for m in ctx.matches)
    return [(r.name, r.reason) for ctx in found for r in ctx.refused]


@pytest.mark.parametrize("kind", RNNS)
def test_one_match_per_weight(kind: type[nn.RNNBase]) -> None:
    model = around(kind, 6, 5, 2, bidirectional=True)
    (graph,) = capture(model, (torch.randn(3, 2, 6),))
    matches = detect(graph, Config()).matches
    names = [f"rnn.weight_{w}_l{layer}{d}" for layer in (0, 1) for d in ("", "_reverse") for w in ("ih", "hh")]
    assert [m.parameter for m in matches] == [m.name for m in matches] == names
    assert len({m.node for m in matches}) == 1 and all(m.kind == "rnn" for m in matches)
    gates = 5 * (4 if kind is nn.LSTM else 3)
    assert [m.matrix_shape for m in matches[:5:4]] == [(gates, 6), (gates, 10)]
    assert all(m.geometry.x == (3, 2, m.matrix_shape[1]) for m in matches)


@pytest.mark.parametrize("kind", RNNS)
@pytest.mark.parametrize("options", ({}, {"batch_first": True, "bidirectional": True, "num_layers": 2}))
def test_dynamo_and_export_agree(kind: type[nn.RNNBase], options: dict[str, Any]) -> None:
    with pytest.warns(UserWarning, match="were assigned during export"):
        matches, _ = detected(around(kind, 6, 5, **options), torch.randn(3, 2, 6))
    assert matches == {"rnn": 8 if options else 2}


@pytest.mark.parametrize("kind", RNNS)
@pytest.mark.parametrize("use", ("all", "out", "last"))
def test_rewritten_call(kind: type[nn.RNNBase], use: str) -> None:
    run = check(around(kind, 12, 20, use=use), torch.randn(5, 3, 12))
    name = kind.__name__.lower()
    assert run.ops["tile_gemm"] == run.ops["rnn_steps"] == 1 and name not in run.ops
    assert run.context.counts["rewrite_rnn"] == 1
    assert [d.kernel for d in run.context.decisions] == ["tile_gemm", "rnn_steps"]


@pytest.mark.parametrize("kind", RNNS)
@pytest.mark.parametrize("steps, batch", ((1, 1), (4, 1), (1, 3), (6, 2)))
def test_layers_directions_and_batch_first(kind: type[nn.RNNBase], steps: int, batch: int) -> None:
    model = around(kind, 7, 33, 2, batch_first=True, bidirectional=True)
    run = check(model, torch.randn(batch, steps, 7))
    assert run.ops["rnn_steps"] == 4 and run.context.counts["rewrite_rnn"] == 2


@pytest.mark.parametrize("kind", RNNS)
def test_given_states(kind: type[nn.RNNBase]) -> None:
    states = [torch.randn(4, 3, 10) for _ in range(2 if kind is nn.LSTM else 1)]
    check(around(kind, 6, 10, 2, bidirectional=True), torch.randn(5, 3, 6), *states)


@pytest.mark.parametrize("kind", RNNS)
def test_without_bias_and_without_a_batch(kind: type[nn.RNNBase]) -> None:
    run = check(around(kind, 6, 10, bias=False), torch.randn(5, 6))
    assert run.ops["rnn_steps"] == 1


@settings(max_examples=12)
@given(
    st.sampled_from(RNNS), st.integers(1, 5), st.integers(1, 9), st.integers(1, 20), st.integers(1, 70), st.integers(1, 3),
    st.booleans(), st.booleans(), st.booleans(),
)  # fmt: skip
def test_any_shape(
    kind: type[nn.RNNBase], steps: int, batch: int, size: int, hidden: int, layers: int, twice: bool, first: bool, bias: bool
) -> None:
    model = around(kind, size, hidden, layers, share=0.7, bidirectional=twice, batch_first=first, bias=bias)
    check(model, torch.randn(batch, steps, size) if first else torch.randn(steps, batch, size))


@pytest.mark.parametrize("kind", RNNS)
def test_a_layer_without_zeros_stays_torchs(kind: type[nn.RNNBase]) -> None:
    for dense in (0, 1, 2):
        model = around(kind, 8, 12, 3, share=0.0, bidirectional=True)
        for layer in {0, 1, 2} - {dense}:
            getattr(model.rnn, f"weight_hh_l{layer}").data[:, ::2] = 0  # one of four weights of the layer is enough
        run = check(model, torch.randn(3, 2, 8))
        assert run.ops[kind.__name__.lower()] == 1 and run.ops["rnn_steps"] == 4
        stays = [d for d in run.context.decisions if d.match.recurrent.layer == dense]  # type: ignore[union-attr]
        assert len(stays) == 4 and all(d.reason == "no zeros" and not d.chosen for d in stays)


def test_a_slower_layer_stays_torchs() -> None:
    run = check(around(nn.LSTM, 8, 12), torch.randn(3, 2, 8), min_speedup=100)
    assert not run.changed and run.ops["lstm"] == 1
    assert all(d.reason.startswith("kept dense: its layer reaches") for d in run.context.decisions)
    assert [d.timing is not None for d in run.context.decisions] == [False, True]


def test_the_same_layer_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(self.rnn(x)[0].relu())[0]

    run = check(zero_some(Twice().eval()), torch.randn(4, 2, 8))
    assert run.ops["rnn_steps"] == 2


def test_training_keeps_torchs_call() -> None:
    model = around(nn.LSTM, 8, 12).train()
    x = torch.randn(3, 2, 8)
    (graph,) = capture(model, (x,))
    clone, ctx, changed = pipeline.rewrite(graph.gm, graph.inputs, Config(**FORCED, sparsity=0.5))
    assert not changed and all("no gradient" in d.reason for d in ctx.decisions) and len(ctx.decisions) == 2
    assert not any("rnn_steps" in str(n.target) for n in clone.graph.nodes)


def test_another_dtype_stays_torchs() -> None:
    run = check(around(nn.GRU, 8, 12).double(), torch.randn(3, 2, 8).double())
    assert not run.changed and all("needs float32" in d.reason for d in run.context.decisions)


@pytest.mark.parametrize("kind, ours", [(nn.LSTM, False), (nn.GRU, True)])
def test_autocast_keeps_an_lstm_dense_and_not_a_gru(kind: Any, ours: bool) -> None:
    """Torch computes the first in bfloat16; of the second only products are, and its results stay float32."""
    if not ours and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("torch has no bfloat16 LSTM on this processor")
    x = torch.randn(3, 2, 8)
    model = around(kind, 8, 12, 2, bidirectional=True)
    with torch.autocast("cpu", torch.bfloat16):
        run = rewritten(model, x, exact=())  # states of the graph are float32
    assert run.changed is ours and all(d.chosen is ours for d in run.context.decisions)
    assert all("autocast" in d.reason for d in run.context.decisions if not d.chosen)
    for result, expected in zip(tensors(run.output), tensors(run.expected), strict=True):
        assert result.dtype == expected.dtype == (torch.float32 if ours else torch.bfloat16)
        torch.testing.assert_close(result, expected, rtol=0, atol=2.0**-7 if ours else 0.0)


@pytest.fixture
def quiet_projections() -> Iterator[None]:
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LSTM with projections")
        yield


def test_refused_calls(quiet_projections: None) -> None:
    x = torch.randn(3, 2, 8)
    assert reasons(around(nn.LSTM, 8, 12, proj_size=4), x) == [("rnn", "projections (proj_size) have no kernel")]
    assert reasons(around(nn.RNN, 8, 12), x) == [("rnn", "plain nn.RNN has no kernel, only LSTM and GRU have")]
    relu = around(nn.RNN, 8, 12, nonlinearity="relu")
    assert reasons(relu, x) == [("rnn", "plain nn.RNN has no kernel, only LSTM and GRU have")]


def test_a_weight_written_in_the_graph_is_refused() -> None:
    class Writes(Around):
        def forward(self, x: Tensor, *states: Tensor) -> Any:
            self.rnn.weight_hh_l0.mul_(0.5)
            return self.rnn(x)[0]

    model = Writes(nn.LSTM(8, 12)).eval()
    assert reasons(model, torch.randn(3, 2, 8)) == [("rnn", "its weights are written in the graph")]


def test_a_computed_weight_is_refused() -> None:
    class Computes(Around):
        def forward(self, x: Tensor, *states: Tensor) -> Any:
            h = x.new_zeros(1, x.shape[1], 12)
            w = [p * 2 for p in self.rnn.parameters()]
            return torch.gru(x, h, w, True, 1, 0.0, False, False, False)[0]

    ((_, reason),) = reasons(Computes(nn.GRU(8, 12)).eval(), torch.randn(3, 2, 8))
    assert reason == "its weights are not constants of this graph"


def test_dropout_that_is_on_is_refused() -> None:
    class Drops(Around):
        def forward(self, x: Tensor, *states: Tensor) -> Any:
            h = x.new_zeros(2, x.shape[1], 12)
            return torch.gru(x, h, list(self.rnn.parameters()), True, 2, 0.5, True, False, False)[0]

    layer = nn.GRU(8, 12, 2)
    assert reasons(Drops(layer).eval(), torch.randn(3, 2, 8)) == [("rnn", "dropout between its layers is on")]


def test_a_packed_sequence_is_in_no_graph() -> None:
    class Packs(Around):
        def forward(self, x: Tensor, *states: Tensor) -> Any:
            packed = nn.utils.rnn.pack_padded_sequence(x, [3, 2])
            return nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0])[0]

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.encoder = nn.Linear(8, 8), Packs(nn.LSTM(8, 12))

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(self.embed(x))

    ((name, reason),) = reasons(Whole().eval(), torch.randn(3, 2, 8))
    assert name == "encoder.rnn" and reason.startswith("in no graph")


def test_cells_are_refused_once() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.gru = nn.LSTMCell(8, 12), nn.GRUCell(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            h, c, g = x.new_zeros(2, 12), x.new_zeros(2, 12), x.new_zeros(2, 12)
            for step in x:
                h, c = self.lstm(step, (h, c))
                g = self.gru(h, g)
            return g

    found = reasons(Loop().eval(), torch.randn(3, 2, 8))
    assert [name for name, _ in found] == ["lstm", "gru"]
    assert all(reason.startswith("a cell called step by step") for _, reason in found)
