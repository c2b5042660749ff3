"""Which level each layer takes when the sum of times is limited: an exact multiple-choice knapsack.

Layers that only win together form a group: either all of them take one of their levels, or the whole group stays dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Level:
    """One choice of one layer. time: whole units, >= 0. value: what is retained."""

    time: int
    value: float


@dataclass(frozen=True)
class Group:
    """Layers that are decided together; each has at least one level. dense: the choice that leaves all of them alone."""

    layers: tuple[tuple[Level, ...], ...]
    dense: Level


Choice = tuple[int, ...] | None  # a level per layer of a group, ``None`` where the group stays dense


def allocate(groups: Sequence[Group], budget: int) -> list[Choice]:
    """Return the choice per group with the largest total value whose total time is at most ``budget``.

    Dynamic programming over the time spent, so the result is optimal, and a larger budget never has a smaller value.
    Ties go to the lower level, and to dense. Where nothing fits the fastest choice is returned.
    """
    best = torch.zeros(max(budget, 0) + 1, dtype=torch.float64)  # most value within each time
    history: list[tuple[Tensor, list[Tensor]]] = []
    for group in groups:
        dense, sparse, taken = _after(best, group.dense), best, []
        for levels in group.layers:
            sparse, choice = _best_of(torch.stack([_after(sparse, level) for level in levels]))
            taken.append(choice)
        best, together = _best_of(torch.stack([dense, sparse]))
        history.append((together, taken))
    if budget < 0 or best[-1] == -torch.inf:
        return [_fastest(group) for group in groups]
    return _walk_back(groups, history, budget)


def total(groups: Sequence[Group], chosen: Sequence[Choice]) -> Level:
    """Return the time and value of a choice."""
    taken = [
        level
        for group, choice in zip(groups, chosen, strict=True)
        for level in (
            [group.dense] if choice is None else [levels[i] for levels, i in zip(group.layers, choice, strict=True)]
        )
    ]
    return Level(sum(level.time for level in taken), sum(level.value for level in taken))


def _after(best: Tensor, level: Level) -> Tensor:
    """Return the values that are left when ``level`` is taken on top."""
    shifted = torch.full_like(best, -torch.inf)
    if level.time < len(best):
        shifted[level.time :] = best[: len(best) - level.time] + level.value
    return shifted


def _best_of(options: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest of each column and the first row that has it."""
    best = options.amax(0)
    return best, (options == best).to(torch.int8).argmax(0).to(torch.int16)


def _walk_back(groups: Sequence[Group], history: list[tuple[Tensor, list[Tensor]]], left: int) -> list[Choice]:
    chosen: list[Choice] = []
    for group, (together, taken) in zip(reversed(groups), reversed(history), strict=True):
        if together[left] == 0:
            chosen.append(None)
            left -= group.dense.time
            continue
        picks = []
        for levels, choice in zip(reversed(group.layers), reversed(taken), strict=True):
            picks.append(int(choice[left]))
            left -= levels[picks[-1]].time
        chosen.append(tuple(reversed(picks)))
    return chosen[::-1]


def _fastest(group: Group) -> Choice:
    picks = tuple(min(range(len(levels)), key=lambda i: (levels[i].time, -levels[i].value)) for levels in group.layers)
    fast = sum(levels[i].time for levels, i in zip(group.layers, picks, strict=True))
    return None if group.dense.time <= fast else picks
