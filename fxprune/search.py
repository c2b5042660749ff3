"""``max_drop``: the most that may be pruned while a metric of the user's holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxprune.config import Config
from fxprune.errors import ConfigError, DropTooLarge

T = TypeVar("T")
_TRIALS = 8  # pruned models evaluated at most: the share is found to 1/128 of what was asked


@dataclass(frozen=True)
class Search:
    """scale: share of the sparsity asked for. evaluations: calls of ``eval_fn``, the dense model's among them.

    dense, metric: of the dense model, and of the result.
    """

    scale: float
    evaluations: int
    dense: float
    metric: float

    def summary(self) -> dict[str, Any]:
        return {f"search {key}": value for key, value in asdict(self).items()}


def largest_scale(decide: Callable[[float], T], evaluate: Callable[[T | None], float], max_drop: float) -> tuple[T, Search]:
    """Bisect the share of the sparsity; ``evaluate(None)`` is the dense model's metric.

    Returns what ``decide`` gave at the largest share that kept the metric. The metric is taken to fall with the share.
    Raises :class:`~fxprune.errors.DropTooLarge` when no share tried did.
    """
    dense = evaluate(None)
    low, high, scale, reached = 0.0, 1.0, 1.0, dense
    best: T | None = None
    trials = 0
    while trials < _TRIALS:
        decided = decide(scale)
        value = evaluate(decided)
        trials += 1
        if value >= dense - max_drop:
            low, best, reached = scale, decided, value
            if scale == 1.0:
                break
        else:
            high, failed = scale, value
        scale = (low + high) / 2
    if best is None:
        raise DropTooLarge(max_drop=max_drop, dense=dense, metric=failed, scale=high)
    return best, Search(low, trials + 1, dense, reached)


def check_search(eval_fn: object, max_drop: object) -> None:
    """Raise :class:`~fxprune.errors.ConfigError` unless both are given, or neither."""
    if (eval_fn is None) != (max_drop is None):
        expected = "max_drop=" if max_drop is None else "eval_fn=(model) -> float"
        name, given = ("eval_fn", eval_fn) if max_drop is None else ("max_drop", max_drop)
        raise ConfigError(name=name, given=given, expected=f"{expected} beside it")
    if eval_fn is not None and not callable(eval_fn):
        raise ConfigError(name="eval_fn", given=eval_fn, expected="a callable (model) -> float, higher is better")
    number = isinstance(max_drop, (int, float)) and not isinstance(max_drop, bool)
    if max_drop is not None and not (number and 0 <= max_drop < math.inf):  # type: ignore[operator]
        raise ConfigError(name="max_drop", given=max_drop, expected="a number that is not negative")


def metric(eval_fn: Callable[[nn.Module], float], model: nn.Module) -> float:
    """Return a finite ``eval_fn(model)``; the random state of the CPU is as before."""
    with torch.random.fork_rng(devices=[]):
        value = eval_fn(model)
    try:
        number = float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(name="eval_fn", given=f"the result {value!r}", expected="a finite number, higher is better")
    return number


def scaled(config: Config, scale: float) -> Config:
    """Return ``config`` with a share of its sparsity."""
    wanted = config.sparsity
    if scale == 1.0 or wanted is None:
        return config
    if isinstance(wanted, Mapping):
        return replace(config, sparsity={key: value * scale for key, value in wanted.items()})
    return replace(config, sparsity=wanted * scale)
