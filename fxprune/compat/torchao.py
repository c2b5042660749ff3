"""``torchao.sparsity`` after its removal from torchao (August 2026): ``sparsify_`` and its configurations.

    from fxprune.compat.torchao import SemiSparseWeightConfig, sparsify_
    sparsify_(model, SemiSparseWeightConfig())

The weights are pruned in place and stay ordinary Parameters; ``torch.compile(model, backend="hwprune")`` runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from fxprune.errors import ConfigError, NothingToPrune
from fxprune.plan import PrunedWeight, lookup, register
from fxprune.sparsity import get
from fxprune.sparsity.elements import elements, keep_elements, keep_groups


@dataclass(frozen=True)
class SemiSparseWeightConfig:
    """2:4: of four consecutive inputs the two largest weights stay."""


@dataclass(frozen=True)
class BlockSparseWeightConfig:
    """Square blocks; those that are zero already are recorded, and nothing else is pruned."""

    blocksize: int = 64


Configuration = SemiSparseWeightConfig | BlockSparseWeightConfig
FilterFn = Callable[[nn.Module, str], bool]


def is_linear(module: nn.Module, name: str) -> bool:
    """torchao's default filter: every ``nn.Linear``."""
    return isinstance(module, nn.Linear)


def sparsify_(model: nn.Module, config: Configuration, filter_fn: FilterFn | None = None) -> nn.Module:
    """Prune the linear layers that ``filter_fn(module, name)`` accepts, in place, and return the model.

    A weight that already keeps 2 of 4 is left as it is. Raises :class:`~fxprune.errors.ConfigError` for another
    configuration and :class:`~fxprune.errors.NothingToPrune` when no layer is accepted.
    """
    if not isinstance(config, (SemiSparseWeightConfig, BlockSparseWeightConfig)):
        expected = "SemiSparseWeightConfig() or BlockSparseWeightConfig(blocksize)"
        raise ConfigError(name="config", given=config, expected=expected)
    accepts = filter_fn or is_linear
    layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and accepts(m, name)]
    if not layers:
        remedy = "sparsify_ takes nn.Linear; fxprune.prune takes convolutions, too."
        raise NothingToPrune(reason="filter_fn accepts no nn.Linear", remedy=remedy)
    for layer in layers:
        _prune(layer.weight, config)
    return model


@torch.no_grad()
def _prune(weight: torch.Tensor, config: Configuration) -> None:
    if isinstance(config, SemiSparseWeightConfig):
        name, mask = "2:4", keep_groups(weight.detach().abs().float(), 2, 4)
    else:
        side = config.blocksize
        name = f"block:{side}x{side}"
        norms = get(name).score(weight.detach().abs().float(), get(name).tiles(weight.shape))  # type: ignore[attr-defined]
        kept = keep_elements([torch.stack(norms)], int(torch.stack(norms).count_nonzero()))[0]
        rows = kept.repeat_interleave(side, 1)[:, : weight.shape[1]]
        mask = rows.repeat_interleave(side, 0)[: weight.shape[0]]
    weight.masked_fill_(~mask, 0)
    before = lookup(weight)
    if before is not None:
        mask = mask & before.mask
    register(weight, PrunedWeight(name, elements(mask), mask))
