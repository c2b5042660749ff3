"""The toughest rival of sparse kernels: the same model with fewer channels (Torch-Pruning), at equal multiplications."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

STEPS = 7  # halvings of the interval the share lies in
ROUND_TO = 8  # channels are multiples of this, which dense kernels want


def multiplications(model: nn.Module, inputs: Sequence[Tensor]) -> float:
    """Return the multiplications by non-zero weights of convolutions and linear layers in one forward."""
    total = 0.0

    def add(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        weight = module.get_parameter("weight")
        features = output.shape[-1] if isinstance(module, nn.Linear) else output.shape[1]
        total += output.numel() / features * int(weight.count_nonzero())

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def channel_pruned(model: nn.Module, inputs: Sequence[Tensor], most: float) -> nn.Module:
    """Return a copy with as many channels as ``most`` multiplications of one forward allow.

    The same share of every group of coupled channels goes, those of least norm; the share is halved in on. Raises
    ImportError without Torch-Pruning, ValueError when even without nearly all channels more are left.
    """
    low, high, best = 0.0, 1.0, None
    for _ in range(STEPS):
        middle = (low + high) / 2
        smaller = _without(model, inputs, middle)
        if multiplications(smaller, inputs) > most:
            low = middle
        else:
            high, best = middle, smaller
    if best is None:
        raise ValueError(f"Torch-Pruning leaves more than {most:.3g} multiplications without {low:.0%} of the channels")
    return best


def _without(model: nn.Module, inputs: Sequence[Tensor], share: float) -> nn.Module:
    """Return a copy in the model's type without a share of its channels."""
    import torch_pruning as tp

    smaller = copy.deepcopy(model).float()
    for parameter in smaller.parameters():
        parameter.requires_grad_(True)  # what it takes for a layer that may be pruned
    last = [m for m in smaller.modules() if isinstance(m, nn.Linear)][-1:]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of parameters outside of layers, which it prunes as it should
        tp.pruner.MagnitudePruner(
            smaller,
            inputs[0][:1].float(),  # whose graph of all activations it keeps
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            pruning_ratio=share,
            round_to=ROUND_TO,
            ignored_layers=last,
        ).step()
    return smaller.eval().to(next(model.parameters()).dtype)
