"""How pruned elements stay zero over an optimizer's step: by zeroing what it wrote, or what it is about to read.

The update of an elementwise optimizer is zero where gradient, weight and moments are. For those, zeros are written to the
gradient ahead of the step, a third of the memory that weight and two moments take. Of the others, and where somebody else
wrote to any of these, weight and moments are zeroed after the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fxprune.ops.clear_pruned import reference

_RENEWAL = 32  # steps in which every weight and its moments are zeroed once, whoever wrote to them behind autograd's back
# by exact class, for a subclass may do anything; with whether it divides by a square root. Adamax, Rprop and ASGD keep state
# that is not zero where gradients are
_ELEMENTWISE = {
    torch.optim.SGD: False,
    torch.optim.Adam: True,
    torch.optim.AdamW: True,
    torch.optim.NAdam: True,
    torch.optim.RAdam: True,
    torch.optim.RMSprop: True,
    torch.optim.Adagrad: True,
    torch.optim.Adadelta: True,
}

Kept = Sequence[tuple[Tensor, Tensor]]  # parameters of one optimizer, each with its bits of fxprune.hold
_Seen = list[tuple[Tensor, int]]  # tensors, each after so many of the writes that autograd counts


class _Zeroed:
    """A parameter whose pruned elements are zero, its bits, all that its optimizer keeps for it, and what was written.

    Every step asks every one of these: comparisons are by identity and by counts alone.
    """

    __slots__ = ("bits", "parameter", "seen", "values")

    def __init__(self, optimizer: torch.optim.Optimizer, parameter: Tensor, bits: Tensor) -> None:
        self.parameter, self.bits = parameter, bits
        self.values = list(optimizer.state.get(parameter, {}).values())
        self.seen = _seen(written(optimizer, parameter))

    def keeps(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether the optimizer keeps the tensors that it kept."""
        values = optimizer.state.get(self.parameter, {}).values()
        return len(values) == len(self.values) and all(map(is_, values, self.values))

    def is_unwritten(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether nobody wrote to the parameter and its state since, nor put others in their place."""
        return all(tensor._version == count for tensor, count in self.seen) and self.keeps(optimizer)

    def renew(self) -> None:
        """Take what was written until now for zeros."""
        self.seen = [(tensor, tensor._version) for tensor, _ in self.seen]


class HeldSteps:
    """Keeps the pruned elements of parameters zero over the steps of their optimizers.

    masks_gradients: zeros may be written to gradients as well.
    """

    def __init__(self, masks_gradients: bool) -> None:
        self._masks_gradients = masks_gradients
        self._zeroed: dict[int, _Zeroed] = {}  # by identity of the parameter
        self._masked: dict[int, tuple[Tensor | None, int]] = {}  # the same: the gradient that the step now running reads
        self._count = 0

    def before(self, optimizer: torch.optim.Optimizer, kept: Kept, arguments: bool) -> None:
        """Zero gradients where that is enough; call it ahead of a step. arguments: the step has some, such as a closure."""
        self._masked = {}
        if not self._masks_gradients or arguments or not _leaves_zeros(optimizer):  # a closure makes new gradients
            return
        chosen = []
        for parameter, bits in kept:
            was = self._zeroed.get(id(parameter))
            if was is not None and was.bits is bits and was.is_unwritten(optimizer) and _plain(parameter):
                chosen.append((parameter, bits))
        # the last one first: the optimizer then finds those that it begins with in the cache
        clear([(parameter.grad, bits) for parameter, bits in reversed(chosen) if parameter.grad is not None])
        self._masked = {id(parameter): _gradient(parameter) for parameter, _ in chosen}

    def after(self, optimizer: torch.optim.Optimizer, kept: Kept, arguments: bool) -> None:
        """Zero what the step may have written; call it after the step."""
        self._count += 1
        moved = []
        for index, (parameter, bits) in enumerate(kept):
            masked = None if arguments else self._masked.get(id(parameter))
            still = masked is not None and parameter.grad is masked[0] and _gradient(parameter)[1] == masked[1]
            if not still or (self._count + index) % _RENEWAL == 0:
                moved.append((parameter, bits))
        zero(optimizer, moved)
        for parameter, bits in kept:
            was = self._zeroed.get(id(parameter))
            if was is not None and was.bits is bits and was.keeps(optimizer):
                was.renew()
            else:
                self._zeroed[id(parameter)] = _Zeroed(optimizer, parameter, bits)
        self._masked = {}

    def settled(self, parameter: Tensor, bits: Tensor) -> bool:
        """Return whether nobody wrote to a parameter since its pruned elements became zero."""
        was = self._zeroed.get(id(parameter))
        return was is not None and was.bits is bits and parameter._version == was.seen[0][1]

    def forget(self) -> None:
        """Zero everything after the next step."""
        self._zeroed = {}


def clear(pairs: Kept) -> None:
    """Zero what each tensor's bits do not keep: an AND of integers, exact over NaN and Inf."""
    values, kept = [], []
    for tensor, bits in pairs:
        own = local(tensor)
        if own.is_complex():
            reference([torch.view_as_real(own)], [bits.squeeze(1).unsqueeze(-1)])
        elif not (own.is_cpu and own.is_contiguous()):
            reference([own], [bits.squeeze(1)])
        elif own.numel():  # which a rank has none of without a part of a small weight
            values.append(own)
            kept.append(bits)
    if values:
        torch.ops.fxprune.clear_pruned(values, kept)
        torch.autograd.graph.increment_version(values)


def zero(optimizer: torch.optim.Optimizer, kept: Kept) -> None:
    """Zero pruned elements of parameters and of everything of their shape that the optimizer keeps for them."""
    clear([(value, bits) for parameter, bits in kept for value in written(optimizer, parameter)])


def written(optimizer: torch.optim.Optimizer, parameter: Tensor) -> list[Tensor]:
    """Return what a step writes to: a parameter, then the state of its shape."""
    shape = parameter.shape
    state = optimizer.state.get(parameter, {}).values()
    return [parameter, *(value for value in state if isinstance(value, Tensor) and value.shape == shape)]


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor; writing to it writes to the tensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _leaves_zeros(optimizer: torch.optim.Optimizer) -> bool:
    """True when the update of zeros is zero, and costs no more than that of other numbers."""
    divides = _ELEMENTWISE.get(type(optimizer))
    if divides is None:
        return False
    # unless it is fused, the step itself was measured to be slower over second moments that are zero
    return not divides or all(
        group["eps"] > 0 and (group.get("fused") or _on_gpu(group)) for group in optimizer.param_groups
    )


def _on_gpu(group: dict[str, Any]) -> bool:
    return all(parameter.is_cuda for parameter in group["params"])


def _plain(parameter: Tensor) -> bool:
    """True when zeros may be written to the gradient, and versions tell who else wrote to parameter and state."""
    grad = parameter.grad
    if type(parameter) is not torch.nn.Parameter or grad is None:
        return type(parameter) is torch.nn.Parameter
    return type(grad) is Tensor and not grad.requires_grad and not grad.is_sparse and grad.stride() == parameter.stride()


def _gradient(parameter: Tensor) -> tuple[Tensor | None, int]:
    grad = parameter.grad
    return grad, 0 if grad is None else grad._version


def _seen(tensors: list[Tensor]) -> _Seen:
    return [(tensor, tensor._version) for tensor in tensors]
