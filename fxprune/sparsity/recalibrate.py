"""HSR: move the kept counts of a plan to multiples of a hardware tile (DEPrune, Sec. 5.2 and Fig. 7c).

A kernel works on whole tiles, so a group that keeps ``63`` units pays for ``64`` and one that keeps ``33``
pays for ``64`` as well. Every unaligned layer is rounded down ("o", over-pruned) or up ("u", under-pruned):

    with gains   beta = alpha / eps, the time saved per removed unit, ranks the layers; the first half goes
                 down, the rest goes up, which keeps the total near the target.
    without      the nearest multiple, under the constraint that the total stays within a tolerance.

No group is ever rounded to 0. A tail group (fewer channels than the others) is aligned by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fxprune.errors import ConfigError

TOLERANCE = 0.003  # of all weights; the paper's own models move by at most 0.002 (Table 3)
_MARGIN = 24  # items near the cut that the exact search may flip
_BINS = 4096  # totals the exact search tells apart

Gains = Callable[[str, int, int], float] | Mapping[str, float]


@dataclass(frozen=True)
class Kept:
    """One layer: kept units and all units per group, and weight elements per unit."""

    counts: tuple[int, ...]
    sizes: tuple[int, ...]
    unit: int = 1


@dataclass(frozen=True)
class Recalibration:
    """Aligned counts by layer.

    ``rounding``: "over", "under" or "" (was aligned) by layer. ``sparsity``: fraction of zeros over all layers.
    """

    counts: dict[str, tuple[int, ...]]
    rounding: dict[str, str]
    sparsity: float

    @property
    def pattern(self) -> str:
        """How many layers went up and down, as the paper's Table 3 writes it: "9u8o"."""
        words = list(self.rounding.values())
        return f"{words.count('under')}u{words.count('over')}o"

    def note(self, layer: str) -> str:
        """Return "9u8o: over", "9u8o: under", or "" for a layer that was aligned."""
        word = self.rounding[layer]
        return f"{self.pattern}: {word}" if word else ""


def floor_to(count: int, size: int, tile: int) -> int:
    """Round down to a multiple of ``tile``; never below one tile, or the group where that is smaller."""
    return count if aligned(count, size, tile) else max(count // tile * tile, min(tile, size))


def ceil_to(count: int, size: int, tile: int) -> int:
    """Round up to a multiple of ``tile``, or to the whole group."""
    return count if aligned(count, size, tile) else min(-(-count // tile) * tile, size)


def aligned(count: int, size: int, tile: int) -> bool:
    """A count has no waste when it fills whole tiles, or when nothing of the group is pruned."""
    return count == size or (count % tile == 0 and count > 0)


def recalibrate_counts(
    layers: Mapping[str, Kept],
    tile: int,
    gains: Gains | None = None,
    *,
    target: float | None = None,
    tolerance: float = TOLERANCE,
) -> Recalibration:
    """Align the kept counts of every group to ``tile``.

    gains: alpha by layer, or ``gain(layer, kept, floor)`` with the counts of the layer's largest full group:
    the time saved on the whole layer by rounding it down (any unit, the same for all layers). ``None``:
    nearest multiples, total sparsity within ``tolerance`` of ``target`` where the layers allow it.
    target: total sparsity; ``None`` takes that of the given counts.

    Raises :class:`ConfigError` for a tile below 1 or a gain that is not finite.
    """
    if tile < 1:
        raise ConfigError(name="tile", given=tile, expected="an integer >= 1")
    if gains is None:
        counts = _nearest(layers, tile, target, tolerance)
        rounding = {name: _direction(layers[name].counts, counts[name]) for name in layers}
    else:
        rounding = _rank(layers, tile, gains)
        counts = {name: _apply(layers[name], tile, rounding[name]) for name in layers}
    total = sum(layer.unit * sum(layer.sizes) for layer in layers.values())
    kept = sum(layer.unit * sum(counts[name]) for name, layer in layers.items())
    return Recalibration(counts, rounding, 1.0 - kept / max(total, 1))


def _rank(layers: Mapping[str, Kept], tile: int, gains: Gains) -> dict[str, str]:
    """Steps 2 to 4 of HSR. A layer that has no whole tile to fall back to can only go up."""
    rounding = dict.fromkeys(layers, "")
    betas: dict[str, float] = {}
    for name, layer in layers.items():
        full = _full_groups(layer)
        if all(aligned(count, size, tile) for count, size in full):
            continue
        rounding[name] = "under"
        overflow = sum(max(count - floor_to(count, size, tile), 0) for count, size in full)
        if overflow:
            count, size = max(full)
            alpha = gains(name, count, floor_to(count, size, tile)) if callable(gains) else gains[name]
            if not math.isfinite(alpha):
                raise ConfigError(name=f"gain[{name!r}]", given=alpha, expected="a finite time")
            betas[name] = alpha / overflow
    unaligned = sum(word != "" for word in rounding.values())
    ranked = sorted(betas, key=lambda name: -betas[name])
    rounding.update(dict.fromkeys(ranked[: unaligned // 2], "over"))
    return rounding


def _full_groups(layer: Kept) -> list[tuple[int, int]]:
    widest = max(layer.sizes, default=0)
    return [(c, s) for c, s in zip(layer.counts, layer.sizes, strict=True) if s == widest]


def _apply(layer: Kept, tile: int, word: str) -> tuple[int, ...]:
    widest = max(layer.sizes, default=0)
    rounded = []
    for count, size in zip(layer.counts, layer.sizes, strict=True):
        low, high = floor_to(count, size, tile), ceil_to(count, size, tile)
        if size == widest:
            rounded.append(low if word == "over" else high)
        else:
            rounded.append(high if high - count <= count - low else low)
    return tuple(rounded)


def _direction(before: tuple[int, ...], after: tuple[int, ...]) -> str:
    if before == after:
        return ""
    return "over" if sum(after) < sum(before) else "under"


def _nearest(layers: Mapping[str, Kept], tile: int, target: float | None, tolerance: float) -> dict[str, tuple[int, ...]]:
    """Groups of a layer that agree in count and size stay equal (BWT), so they are rounded as one item."""
    items: dict[tuple[str, int, int], int] = {}
    for name, layer in layers.items():
        for count, size in zip(layer.counts, layer.sizes, strict=True):
            key = (name, count, size)
            items[key] = items.get(key, 0) + layer.unit
    lows = {key: floor_to(key[1], key[2], tile) for key in items}
    highs = {key: ceil_to(key[1], key[2], tile) for key in items}
    down = [(lows[key] - key[1]) * size for key, size in items.items()]
    up = [(highs[key] - key[1]) * size for key, size in items.items()]
    total = sum(layer.unit * sum(layer.sizes) for layer in layers.values())
    kept = sum(layer.unit * sum(layer.counts) for layer in layers.values())
    excess = 0.0 if target is None else kept - (1.0 - target) * total
    goes_up = dict(zip(items, choose(down, up, excess, tolerance * total), strict=True))
    return {
        name: tuple(
            (highs if goes_up[name, count, size] else lows)[name, count, size]
            for count, size in zip(layer.counts, layer.sizes, strict=True)
        )
        for name, layer in layers.items()
    }


def choose(down: Sequence[float], up: Sequence[float], excess: float, slack: float) -> list[bool]:
    """Return for each item whether it takes ``up[i]`` rather than ``down[i]``.

    ``excess`` plus the changes taken ends within ``slack`` of 0 if possible, with as little change as
    possible: items go up in the order of their remainders (0.5 and above for plain rounding), and if no such
    cut is close enough the items around the best one are searched exactly.
    """
    toggles = [u - d for d, u in zip(down, up, strict=True)]
    free = [i for i, toggle in enumerate(toggles) if toggle]
    free.sort(key=lambda i: (down[i] / toggles[i], i))
    totals = [excess + math.fsum(down)]
    for i in free:
        totals.append(totals[-1] + toggles[i])
    plain = sum(-down[i] / toggles[i] >= 0.5 for i in free)
    cut = min(range(len(totals)), key=lambda n: (max(abs(totals[n]) - slack, 0.0), abs(n - plain)))
    chosen = [False] * len(toggles)
    for i in free[:cut]:
        chosen[i] = True
    if abs(totals[cut]) > slack:
        first = max(min(cut - _MARGIN // 2, len(free) - _MARGIN), 0)
        near = free[first : first + _MARGIN]
        rest = totals[cut] - sum(up[i] if chosen[i] else down[i] for i in near)
        found = _search([down[i] for i in near], [up[i] for i in near], rest, slack)
        for i, goes_up in zip(near, found, strict=True):
            chosen[i] = goes_up
    return chosen


def _search(down: Sequence[float], up: Sequence[float], start: float, slack: float) -> list[bool]:
    """Least total change among the choices within ``slack``, else the closest total; exact up to ``_BINS``."""
    span = abs(start) + sum(max(abs(d), abs(u)) for d, u in zip(down, up, strict=True))
    width = max(slack / 32, 2 * span / _BINS, 1e-9)
    states: dict[int, tuple[float, float, int]] = {0: (0.0, start, 0)}
    for bit, (low, high) in enumerate(zip(down, up, strict=True)):
        following: dict[int, tuple[float, float, int]] = {}
        for cost, total, bits in states.values():
            for change, taken in ((low, bits), (high, bits | 1 << bit)):
                state = (cost + abs(change), total + change, taken)
                key = round(state[1] / width)
                if key not in following or state < following[key]:
                    following[key] = state
        states = following
    best = min(states.values(), key=lambda s: (max(abs(s[1]) - slack, 0.0), s[0], abs(s[1])))
    return [bool(best[2] >> bit & 1) for bit in range(len(down))]
