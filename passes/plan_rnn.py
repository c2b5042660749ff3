"""Decide recurrent layers. Both directions of a layer are one decision, because torch runs them as one call.

Each direction is measured as a pair, weight_ih and weight_hh, against torch's own call at the same number of steps and
batch; one of the two may hold no zeros and is then kept whole in the tile format. In training the graph keeps torch's
call on the dense weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..context import Context, Decision, Timing
from ..graph import example
from ..match import Match
from ..sparsity.pattern import LayerMask

Found = tuple[str, LayerMask | None]
_TRAINING = "training keeps torch's own call on the dense weights: the recurrent kernel has no gradient"


def recurrent_layers(matches: Iterable[Match]) -> Iterable[list[Match]]:
    """Group the matches of each call by layer; inside, weight_ih and weight_hh of each direction follow each other."""
    layers: dict[tuple[int, int], list[Match]] = {}
    for match in matches:
        if match.recurrent is not None:
            layers.setdefault((id(match.node), match.recurrent.layer), []).append(match)
    return layers.values()


def decide_recurrent(
    layer: Sequence[Match],
    found: Sequence[Found],
    refusal: Callable[[Match, LayerMask | None, Context], str | None],
    ctx: Context,
) -> None:
    """Append the decisions of one layer; ``found`` holds pattern and mask of each of its weights."""
    reason = _rounded(layer[0]) if ctx.inference else _TRAINING
    reason = reason or next((why for m, (_, mask) in zip(layer, found, strict=True) if (why := refusal(m, mask, ctx))), None)
    if reason is None and all(mask is None for _, mask in found):
        reason = "no zeros"
    if reason is not None:
        for match, (pattern, mask) in zip(layer, found, strict=True):
            ctx.decisions.append(Decision(match, mask, False, reason, pattern=pattern))
        return
    timings: list[Timing] = []
    for i in range(0, len(layer), 2):
        timings.append(ctx.measure(layer[i + 1], found[i + 1][1], (layer[i], found[i][1])))
    ours, dense = sum(t.sparse for t in timings), sum(t.dense for t in timings)
    chosen = ours * ctx.config.min_speedup <= dense
    why = f"its layer reaches {dense / max(ours, 1e-9):.2f}x of dense"
    why += "" if all(t.measured for t in timings) else " (predicted)"
    for i, (match, (pattern, mask)) in enumerate(zip(layer, found, strict=True)):
        text = why if chosen else f"kept dense: {why}"
        kernel = ("tile_gemm", "rnn_steps")[i % 2] if chosen else "dense"
        # the time of a direction stands at its weight_hh, so that it is counted once
        ctx.decisions.append(Decision(match, mask, chosen, text, timings[i // 2] if i % 2 else None, pattern, kernel))


def _rounded(match: Match) -> str | None:
    """Return why autocast keeps an LSTM dense; a GRU's results stay float32 under it, ``None``."""
    output = example(match.node)[0]
    if output.dtype == match.value.dtype:
        return None
    return f"autocast computes it in {output.dtype}, the recurrent kernel computes in {match.value.dtype}"
