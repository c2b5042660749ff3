"""How pruned elements stay zero over an optimizer's step: by zeroing what it wrote, or what it is about to read.

The update of an elementwise optimizer is zero where gradient, weight and moments are. For those, zeros are written to the
gradient ahead of the step, a third of the memory that weight and two moments take. Of the others, and where somebody else
wrote to any of these, weight and moments are zeroed after the step.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from operator import attrgetter, is_
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
_version = attrgetter("_version")  # of a tensor: how many writes autograd counted


class _Zeroed:
    """Parameters of one optimizer whose pruned elements are zero, all that it keeps for them, and what was written."""

    def __init__(self, optimizer: torch.optim.Optimizer, kept: Kept) -> None:
        self._kept = kept
        self._values = _values(optimizer, kept)
        self._written = [tensor for parameter, _ in kept for tensor in written(optimizer, parameter)]
        self.renew()

    def holds(self, optimizer: torch.optim.Optimizer, kept: Kept) -> bool:
        """Return whether these are the parameters, and nobody wrote to them or their state nor put others in its place."""
        values = _values(optimizer, kept)
        same = self._kept is kept and len(values) == len(self._values) and all(map(is_, values, self._values))
        return same and list(map(_version, self._written)) == self._counts

    def renew(self) -> None:
        """Take what was written until now for zeros."""
        self._counts = list(map(_version, self._written))


class HeldSteps:
    """Keeps the pruned elements of parameters zero over the steps of their optimizers.

    masks_gradients: zeros may be written to gradients as well. ``kept`` of an optimizer is the same object in every step
    until :meth:`forget`, unless parameters join it.

    Every step asks whether zeros are still zeros, when nothing that it asks is in a cache: of all parameters in few loops,
    by identities and counts of writes, and the first that was written to decides for all.
    """

    def __init__(self, masks_gradients: bool) -> None:
        self._masks_gradients = masks_gradients
        self._zeroed: weakref.WeakKeyDictionary[torch.optim.Optimizer, _Zeroed] = weakref.WeakKeyDictionary()
        self._settled: dict[int, int] = {}  # by identity of the parameter: its writes when it was zero last
        self._masked: tuple[list[Tensor], list[int]] | None = None  # gradients that the step now running reads; their writes
        self._count = 0

    def before(self, optimizer: torch.optim.Optimizer, kept: Kept, arguments: bool) -> None:
        """Zero gradients where that is enough; call it ahead of a step. arguments: the step has some, such as a closure."""
        self._masked = None
        if not self._masks_gradients or arguments or not _leaves_zeros(optimizer):  # a closure makes new gradients
            return
        was = self._zeroed.get(optimizer)
        if was is None or not was.holds(optimizer, kept) or not all(_plain(parameter) for parameter, _ in kept):
            return
        # the last one first: the optimizer then finds those that it begins with in the cache
        clear([(parameter.grad, bits) for parameter, bits in reversed(kept) if parameter.grad is not None])
        grads = _gradients(kept)
        self._masked = grads, list(map(_version, grads))

    def after(self, optimizer: torch.optim.Optimizer, kept: Kept) -> None:
        """Zero what the step may have written; call it after the step."""
        self._count += 1
        cheap = self._masked is not None and _are_unwritten(_gradients(kept), *self._masked)
        self._masked = None
        if cheap:
            zero(optimizer, kept[-self._count % _RENEWAL :: _RENEWAL])
            self._zeroed[optimizer].renew()
        else:
            zero(optimizer, kept)
            self._trust(optimizer, kept)
        self._settled.update((id(parameter), parameter._version) for parameter, _ in kept)

    def settle(self, optimizer: torch.optim.Optimizer, kept: Kept) -> None:
        """Zero what an optimizer keeps for parameters whose pruned elements are zero; the next step may count on it."""
        clear([(value, bits) for parameter, bits in kept for value in written(optimizer, parameter)[1:]])
        self._trust(optimizer, kept)

    def _trust(self, optimizer: torch.optim.Optimizer, kept: Kept) -> None:
        """Take parameters and what an optimizer keeps for them for zero where they are pruned, until somebody writes."""
        if self._masks_gradients and _leaves_zeros(optimizer):
            self._zeroed[optimizer] = _Zeroed(optimizer, kept)

    def unsettled(self, kept: Kept) -> Kept:
        """Return the parameters that somebody wrote to since their pruned elements became zero."""
        return [pair for pair in kept if self._settled.get(id(pair[0])) != pair[0]._version]

    def forget(self) -> None:
        """Zero everything after the next step."""
        self._zeroed.clear()
        self._settled = {}
        self._masked = None


def clear(pairs: Kept) -> None:
    """Zero what each tensor's bits do not keep: an AND of integers, exact over NaN and Inf."""
    values, kept = [], []
    for tensor, bits in pairs:
        own = local(tensor)
        if own.is_complex():
            reference([torch.view_as_real(own)], [bits.unsqueeze(-1)])
        elif not (own.is_cpu and own.is_contiguous()):
            reference([own], [bits])
        elif own.numel():  # which a rank has none of without a part of a small weight
            values.append(own)
            kept.append(bits)
    if values:
        torch.ops.fxprune.clear_pruned(values, kept)
        torch.autograd.graph.increment_version(values)


def zero(optimizer: torch.optim.Optimizer, kept: Kept) -> None:
    """Zero pruned elements of parameters and of everything of their shape that the optimizer keeps for them."""
    if kept:
        with torch.no_grad():
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


def _gradients(kept: Kept) -> list[Tensor]:
    return [grad for parameter, _ in kept if (grad := parameter.grad) is not None]


def _are_unwritten(grads: list[Tensor], masked: list[Tensor], counts: list[int]) -> bool:
    return len(grads) == len(masked) and all(map(is_, grads, masked)) and list(map(_version, grads)) == counts


def _values(optimizer: torch.optim.Optimizer, kept: Kept) -> list[Any]:
    """Return what an optimizer keeps for its parameters."""
    return [value for parameter, _ in kept for value in optimizer.state.get(parameter, {}).values()]
