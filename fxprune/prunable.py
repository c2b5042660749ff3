"""Which layers of a model may be pruned."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fxprune.capture import capture, detect
from fxprune.config import KINDS, Config
from fxprune.context import Context
from fxprune.errors import ComputedWeight, ConfigError, NothingToPrune
from fxprune.left import left_rows, other_readers, why_left
from fxprune.match import Match


def contexts_of(model: nn.Module, example_inputs: Any, config: Config) -> list[Context]:
    """Return what was detected in each graph of ``model``."""
    if not isinstance(model, nn.Module):
        raise ConfigError(name="model", given=type(model).__name__, expected="a torch.nn.Module")
    return [detect(graph, config) for graph in capture(model, example_inputs)]


def prunable(
    model: nn.Module, contexts: Sequence[Context], filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> list[Match]:
    """Return the matches whose weight may be zeroed: a parameter that nothing unmatched reads.

    Warns with :class:`~fxprune.errors.ComputedWeight` of layers whose weight a mask or a parametrization computes.
    """
    modules = dict(model.named_modules())
    readers = other_readers(contexts)
    found: list[Match] = []
    computed: list[str] = []
    for ctx in contexts:
        for match in ctx.matches:
            owner = match.parameter.rpartition(".")[0]  # "" when the model itself is the layer
            if not isinstance(match.value, nn.Parameter) and ctx.weights.origin(match.weight) is not match.weight:
                computed.append(match.name)
                continue
            if owner not in modules or why_left(match, ctx, readers) is not None:
                continue
            if filter_fn is None or filter_fn(modules[owner], match.name):
                found.append(match)
    if computed:
        message = (
            f"{len(computed)} layer(s) are left as they are, because their weight is computed (a mask, a parametrization or "
            f"a weight norm) and not a Parameter: {', '.join(computed)}. Make it one first, with "
            "torch.nn.utils.prune.remove or torch.nn.utils.parametrize.remove_parametrizations."
        )
        if not found:
            raise NothingToPrune(reason=message, remedy="Then prune again.")
        warnings.warn(message, ComputedWeight, stacklevel=3)
    if not found:
        left = "; ".join(f"{name}: {reason}" for name, _, _, reason in left_rows(contexts, set())[:3])
        raise NothingToPrune(
            reason=f"no convolution, linear or recurrent layer among the {len(contexts)} captured graph(s)"
            + (f" may be pruned ({left})" if left else ""),
            remedy="Supported kinds: " + ", ".join(KINDS) + ".",
        )
    return found
