"""Importance by gradients over several optimizer steps, for :class:`~fxprune.pruner.Pruner`.

A weight's score is the sum of ``(gradient * weight)^2`` over the steps (Molchanov et al., CVPR 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fxprune.errors import ConfigError
from fxprune.hold import Places, shard, whole
from fxprune.hold_steps import local
from fxprune.importance import Measured
from fxprune.ranks import rank_and_world


class TaylorScores:
    """Adds up ``(gradient * weight)^2`` of the parameters named, of gradients as the optimizer sees them.

    listening: whether the step to come counts. Sharded parameters have sharded scores.
    """

    def __init__(self, names: Sequence[str], places: Places, listening: Callable[[], bool]) -> None:
        self._names, self._places, self._listening = list(names), places, listening
        self._scores: dict[str, Tensor] = {}

    @torch.no_grad()
    def accumulate(self, optimizer: torch.optim.Optimizer) -> None:
        """Add one step's, ahead of the optimizer's; a step that a gradient scaler skips counts for nothing."""
        overflow = getattr(optimizer, "found_inf", None)
        if not self._listening() or (overflow is not None and bool(overflow)):
            return
        scale = getattr(optimizer, "grad_scale", None)  # of a fused optimizer, which unscales in its own kernel
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        fast: list[tuple[Tensor, Tensor, Tensor]] = []
        for name in self._names:
            parameter = self._places[name]
            if id(parameter) not in mine or parameter.grad is None:
                continue
            score = self._scores[name] = self._score(name)
            parts = (local(score), local(parameter.grad), local(parameter))
            if scale is None and all(part.dtype == torch.float32 and part.is_cpu and part.is_contiguous() for part in parts):
                fast.append(parts)
                continue
            product = _product(*parts[1:])
            if scale is not None:
                product /= scale
            parts[0].addcmul_(product, product)
        if fast:
            torch.ops.fxprune.add_squares(*map(list, zip(*fast, strict=True)))

    def measured(self, window: int) -> tuple[Measured, list[str]]:
        """Return the scores, and the names of those without: the same on every rank.

        Raises :class:`~fxprune.errors.ConfigError` when there are none.
        """
        reached = self._reached()
        if self._names and not reached:
            expected = f"a gradient for {self._names[0]!r} or another layer in the {window} steps before a round"
            raise ConfigError(name="importance", given="taylor", expected=expected)
        scores = {name: _reduced(self._score(name)) for name in reached}
        return Measured(scores), [name for name in self._names if name not in scores]

    def clear(self) -> None:
        self._scores = {}

    def _score(self, name: str) -> Tensor:
        known = self._scores.get(name)
        return torch.zeros_like(self._places[name], dtype=torch.float32) if known is None else known

    def _reached(self) -> list[str]:
        """Return the names that have a score on some rank."""
        flags = [name in self._scores for name in self._names]
        if flags and rank_and_world()[1] > 1:
            device = local(self._places[self._names[0]]).device
            here = torch.tensor(flags, dtype=torch.int32, device=device)
            torch.distributed.all_reduce(here, torch.distributed.ReduceOp.MAX)
            flags = here.bool().tolist()
        return [name for name, reached in zip(self._names, flags, strict=True) if reached]

    def state_dict(self) -> dict[str, Tensor]:
        return {name: whole(score).clone() for name, score in self._scores.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._scores = {name: laid_out(score, self._places[name]) for name, score in state.items()}


def laid_out(full: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor that lies as the parameter does, from one that every rank holds in full."""
    result = torch.zeros_like(parameter, dtype=full.dtype)
    local(result).copy_(shard(full, parameter))
    return result


def _product(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return by how much the loss falls, to first order, when a weight becomes zero; float32."""
    if weight.is_complex():
        return (gradient.conj() * weight).real.float()
    return gradient.float() * weight.float()


def _reduced(score: Tensor) -> Tensor:
    """Return a score in full, averaged over the ranks."""
    total = whole(score)
    _, world = rank_and_world()
    if world > 1:
        total = total.clone()
        torch.distributed.all_reduce(total)
        total /= world
    return total
