"""Which layers of a model may be pruned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fxprune.capture import capture, detect
from fxprune.config import KINDS, Config
from fxprune.errors import ConfigError, NothingToPrune
from fxprune.match import Match


def prunable(
    model: nn.Module, example_inputs: Any, config: Config, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> list[Match]:
    """Return the matches whose weight may be zeroed: a float parameter that nothing unmatched shares."""
    if not isinstance(model, nn.Module):
        raise ConfigError(name="model", given=type(model).__name__, expected="a torch.nn.Module")
    graphs = capture(model, example_inputs)
    modules = dict(model.named_modules())
    found: list[Match] = []
    for graph in graphs:
        ctx = detect(graph, config)
        matched = {m.node for m in ctx.matches}
        for match in ctx.matches:
            owner = match.parameter.rpartition(".")[0]  # "" when the model itself is the layer
            if owner not in modules or not isinstance(match.value, nn.Parameter) or _shared(match, matched):
                continue
            if filter_fn is None or filter_fn(modules[owner], match.name):
                found.append(match)
    if not found:
        raise NothingToPrune(
            reason=f"no depthwise, 1x1 or linear layer among the {len(graphs)} captured graph(s)",
            remedy="Supported kinds: " + ", ".join(KINDS) + ".",
        )
    return found


def _shared(match: Match, matched: set[Any]) -> bool:
    """True when something other than matched layers reads the weight (an embedding it is tied to)."""
    stack, seen = list(match.weight.users), set()
    while stack:
        node = stack.pop()
        if node in matched or node in seen:
            continue
        seen.add(node)
        if "transpose" in str(node.target) or "permute" in str(node.target) or str(node.target) in ("aten.t.default", "t"):
            stack.extend(node.users)
        else:
            return True
    return False
