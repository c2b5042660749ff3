"""What was pruned and how: the plan is metadata, the zeros in the weights are the truth."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fxprune.errors import NothingToPrune
from fxprune.hold import bits
from fxprune.hold_steps import zero
from fxprune.sparsity.pattern import LayerMask

# parameter -> PrunedWeight; a weak side table, so that the model stays a plain module
_REGISTRY: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_BITS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter: (PrunedWeight, bits of its mask)
_GENERATION = [0]  # rises with every registration, so that a graph trained under a mask notices a new one


@dataclass(frozen=True)
class PrunedWeight:
    """What the backend needs about one pruned parameter; the mask has the parameter's shape."""

    pattern: str
    layer: LayerMask
    mask: Tensor

    @property
    def transposed(self) -> bool:
        """True when the parameter is stored as the transpose of the matrix that ``layer`` is of."""
        return not torch.equal(self.mask.cpu().reshape(-1), self.layer.mask.cpu().reshape(-1))


@dataclass(frozen=True)
class LayerPlan:
    """One pruned layer. counts: kept units per tile; columns: kept output features (``None`` = all)."""

    name: str
    parameter: str
    kind: str
    pattern: str
    shape: tuple[int, ...]
    target: float
    sparsity: float
    granularity: int
    counts: tuple[int, ...]
    columns: tuple[int, ...] | None
    note: str = ""


def tiles(layer: LayerMask) -> dict[str, Any]:
    """Return what a :class:`LayerPlan` says of a mask's tiles; columns: ``None`` when all output features are kept."""
    tiling = layer.tiling
    every = len(tiling.columns) == tiling.shape[0]
    columns = None if every else tuple(tiling.columns.tolist())
    return {"granularity": tiling.granularity, "counts": tuple(layer.counts), "columns": columns}


@dataclass
class Plan:
    """The layers one call of :func:`fxprune.prune` pruned.

    weights: every pruned parameter of the model by name, those of earlier calls and coupled vectors included.
    """

    layers: list[LayerPlan] = field(default_factory=list)
    version: int = 1
    weights: dict[str, PrunedWeight] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, model: nn.Module, layers: Sequence[LayerPlan] = ()) -> Plan:
        """Return the plan of what is pruned of ``model`` now; ``layers`` is what to report of it."""
        found = {name: lookup(parameter) for name, parameter in model.named_parameters()}
        return cls(list(layers), weights={name: pruned for name, pruned in found.items() if pruned is not None})

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def to_dict(self) -> dict[str, Any]:
        return {"version": self.version, "layers": [asdict(layer) for layer in self.layers]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1)

    def save(self, path: str | Path) -> None:
        """Write the plan with its masks as JSON, for :func:`fxprune.load_plan`; weights are in the ``state_dict``."""
        from fxprune.plan_file import save  # that module builds plans, so it imports this one

        save(self, path)

    def hold(self, optimizer: torch.optim.Optimizer) -> torch.utils.hooks.RemovableHandle:
        """Keep pruned weights, and the optimizer's moments for them, at zero after every step.

        Returns the handle that stops it. Raises :class:`~fxprune.errors.NothingToPrune` when the
        optimizer updates none of the pruned parameters.
        """
        held = [p for group in optimizer.param_groups for p in group["params"] if lookup(p) is not None]
        if not held:
            raise NothingToPrune(
                reason="the optimizer holds no parameter of the pruned model",
                remedy="Create it from result.model.parameters().",
            )

        def project(opt: torch.optim.Optimizer, args: object, kwargs: object) -> None:
            project_zeros(opt)

        project_zeros(optimizer)
        return optimizer.register_step_post_hook(project)


def register(parameter: Tensor, pruned: PrunedWeight) -> None:
    """Attach a mask to a live parameter."""
    _REGISTRY[parameter] = pruned
    _GENERATION[0] += 1


def generation() -> int:
    """Return a number that rises whenever a mask is attached."""
    return _GENERATION[0]


def lookup(parameter: Tensor) -> PrunedWeight | None:
    """Return what was pruned of a live parameter, ``None`` when nothing was."""
    return _REGISTRY.get(parameter)


@torch.no_grad()
def project_zeros(optimizer: torch.optim.Optimizer) -> None:
    """Zero the pruned elements of every parameter of ``optimizer`` and of its state."""
    zero(optimizer, [(p, _bits(p)) for group in optimizer.param_groups for p in group["params"] if lookup(p) is not None])


def _bits(parameter: Tensor) -> Tensor:
    """Return the bits of what is kept of a pruned parameter, made once for each mask and device."""
    pruned, known = _REGISTRY[parameter], _BITS.get(parameter)
    if known is None or known[0] is not pruned or known[1].device != parameter.device:
        known = _BITS[parameter] = (pruned, bits(pruned.mask.to(parameter.device)))
    return known[1]
