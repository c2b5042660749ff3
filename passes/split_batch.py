"""Decide a symbolic batch twice, for small and for large batch sizes, where the cost model says that it pays.

The cost of every match is evaluated over the batch sizes 2 to 64 that Dynamo's guards let in; it compiles batch 1 by
itself, and convolutions below 16 apart from those from 16 on. Where the choice of kernels changes, one threshold is taken:
that which loses least to a choice of its own at each size. Every doubling of the batch counts the same. Each side is then
decided, and measured where times are measured, at one of its batch sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch

from ..context import BatchSide, Context, Decision, Measure, Timing
from ..match import Match

_SMALLEST, _LARGEST = 2, 64
# a second compile must save this share of the time in matches
_WORTH = 0.02

Choice = frozenset[Match]


def split_batch(ctx: Context, decide: Callable[[Measure], list[Decision]]) -> tuple[BatchSide, Measure] | None:
    """Return the side of the batch size that is compiled for and the measure at its batch size; ``None`` for no split.

    Only in inference and where the zeros are the weights' own, so that both sides compute the same function.
    """
    symbol, sizes = _batch(ctx.matches)
    if symbol not in ctx.sizes or ctx.predict is None or not ctx.inference:
        return None
    if ctx.config.prunes or ctx.config.require_sparse:
        return None
    predict = ctx.predict
    coarse = {b for b in (sizes.start, 4, 8, 16, 32, sizes.stop - 1) if b in sizes}
    if len({_choice(decide(_at(predict, symbol, batch))) for batch in coarse}) <= 1:
        return None
    found = best_split(sizes, [decide(_at(predict, symbol, batch)) for batch in sizes])
    if found is None:
        return None
    threshold, *representatives = found
    position, batch = ctx.sizes[symbol]
    above = batch >= threshold
    side = BatchSide(position, threshold, above, representatives[above])
    return side, _at(ctx.measure, symbol, side.decided_at)


def best_split(sizes: Sequence[int], plans: Sequence[list[Decision]]) -> tuple[int, int, int] | None:
    """Return (first batch size of the upper side, a batch size to decide the lower side at, one for the upper side).

    plans: the decisions at each of the batch sizes ``sizes``, which rise. ``None`` when one choice is as good within 2 %.
    """
    choices = [_choice(plan) for plan in plans]
    own = [_time(choice, plan) for choice, plan in zip(choices, plans, strict=True)]
    lost = {}  # choice: what it loses up to each size, ends included
    for choice in dict.fromkeys(choices):
        losses = [max(_time(choice, p) - o, 0.0) / max(o, 1e-9) / b for p, o, b in zip(plans, own, sizes, strict=True)]
        lost[choice] = list(accumulate(losses, initial=0.0))
    best = (min(sums[-1] for sums in lost.values()) - _WORTH * sum(1 / b for b in sizes), 0, choices[0], choices[0])
    for i in range(1, len(plans)):
        low = min(dict.fromkeys(choices[:i]), key=lambda c: lost[c][i])
        high = min(dict.fromkeys(choices[i:]), key=lambda c: lost[c][-1] - lost[c][i])
        loss = lost[low][i] + lost[high][-1] - lost[high][i]
        if loss < best[0]:
            best = (loss, i, low, high)
    _, at, low, high = best
    if not at:
        return None
    return sizes[at], _middle(sizes[:at], choices[:at], low), _middle(sizes[at:], choices[at:], high)


def _middle(sizes: Sequence[int], choices: Sequence[Choice], choice: Choice) -> int:
    """Return the middle one of the batch sizes at which ``choice`` is made."""
    made = [size for size, own in zip(sizes, choices, strict=True) if own == choice]
    return made[len(made) // 2]


def _choice(plan: Sequence[Decision]) -> Choice:
    return frozenset(d.match for d in plan if d.chosen)


def _time(choice: Choice, plan: Sequence[Decision]) -> float:
    """Return the microseconds of the timed matches when ``choice`` runs our kernels."""
    return sum(d.timing.sparse if d.match in choice else d.timing.dense for d in plan if d.timing is not None)


def _batch(matches: Sequence[Match]) -> tuple[Any, range]:
    """Return the symbol that is alone in all shapes and in the first size of each activation, and what to try for it."""
    sizes = [s for m in matches for s in (*m.geometry.x, *m.geometry.y) if isinstance(s, torch.SymInt)]
    symbols = {symbol for size in sizes for symbol in size.node.expr.free_symbols}
    batched = all(isinstance(m.geometry.x[0], torch.SymInt) for m in matches)
    if not batched or len(symbols) != 1:
        return None, range(0)
    (symbol,) = symbols
    bounds = sizes[0].node.shape_env.bound_sympy(symbol)
    return symbol, range(max(_SMALLEST, int(bounds.lower)), int(min(_LARGEST, bounds.upper)) + 1)


def _at(measure: Measure, symbol: Any, batch: int) -> Measure:
    """Return a measure of the same matches at a batch size."""
    known: dict[Any, int] = {}

    def concrete(size: Any) -> int:
        if not isinstance(size, torch.SymInt):
            return int(size)
        expr = size.node.expr
        if expr not in known:
            known[expr] = int(expr.subs({symbol: batch}))
        return known[expr]

    def resized(match: Match) -> Match:
        x, y = (tuple(map(concrete, shape)) for shape in (match.geometry.x, match.geometry.y))
        return replace(match, geometry=replace(match.geometry, x=x, y=y))

    def timed(match: Match, mask: Any, inputs: Any = None) -> Timing:
        if inputs is None:
            return measure(resized(match), mask)
        return measure(resized(match), mask, (resized(inputs[0]), inputs[1]))

    return timed
