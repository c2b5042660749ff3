"""Run a model over calibration batches and leave no trace in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.capture import arguments, evaluating
from fxprune.errors import CalibrationError, ConfigError
from fxprune.layer_inputs import Call, Recorder

LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches that can be run more than once.

    batches: each is what the model takes (a tensor, a tuple of positional or a dict of keyword arguments); with
        ``loss_fn`` a pair ``(inputs, targets)``, for ``loss_fn(output, targets)``.
    """

    batches: Iterable[Any]
    loss_fn: LossFn | None = None

    @classmethod
    def of(cls, batches: Iterable[Any] | None, loss_fn: LossFn | None) -> Calibration | None:
        """Check what the user gave; an iterator, which runs only once, is read into a list."""
        if batches is None:
            if loss_fn is not None:
                raise ConfigError(name="loss_fn", given=loss_fn, expected="calibration=[(inputs, targets), ...] beside it")
            return None
        if isinstance(batches, (Tensor, str, Mapping)) or not isinstance(batches, Iterable):
            expected = "an iterable of batches, such as a DataLoader or [batch]"
            raise ConfigError(name="calibration", given=type(batches).__name__, expected=expected)
        if loss_fn is not None and not callable(loss_fn):
            raise ConfigError(name="loss_fn", given=loss_fn, expected="a callable (output, targets) -> scalar tensor")
        return cls(list(batches) if isinstance(batches, Iterator) else batches, loss_fn)

    def run(self, model: nn.Module, use: Callable[[Any, Any], None], gradients: bool = False) -> None:
        """Call ``use(output, targets)`` after the model ran on each batch, in evaluation mode.

        Raises :class:`~fxprune.errors.CalibrationError`. Whatever happens, flags, buffers and the random state are
        as they were.
        """
        count = 0
        with preserved(model), torch.inference_mode(False), torch.set_grad_enabled(gradients):
            for batch in progress(self.batches, "calibration"):
                inputs, targets = self._split(batch, count)
                args, kwargs = arguments(inputs)
                try:
                    output = model(*args, **kwargs)
                except Exception as error:
                    reason = f"the model failed on batch {count} of {_shapes(args, kwargs)}: {type(error).__name__}: {error}"
                    remedy = "A batch is what the model takes, or with loss_fn a pair (inputs, targets)."
                    raise CalibrationError(reason=reason, remedy=remedy) from error
                use(output, targets)
                count += 1
        if not count:
            raise CalibrationError(reason="it holds no batch", remedy="Pass at least one batch.")

    def record(self, model: nn.Module, weights: Mapping[str, Tensor], sink: Callable[[Call], None]) -> None:
        """Hand every call of the given weights to ``sink``, over all batches."""
        with Recorder(weights, sink):
            self.run(model, lambda output, targets: None)

    def loss(self, output: Any, targets: Any) -> Tensor:
        """Return the scalar loss of a batch: ``loss_fn``'s, or the one in the output (transformers)."""
        if self.loss_fn is not None:
            loss: Any = self.loss_fn(output, targets)
        else:
            loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            whose = "loss_fn returned" if self.loss_fn is not None else "the model's output has no .loss but"
            reason = f"{whose} {tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__}"
            remedy = "Pass loss_fn=(output, targets) -> differentiable scalar with batches (inputs, targets)."
            raise CalibrationError(reason=reason, remedy=remedy)
        if not torch.isfinite(loss):
            raise CalibrationError(reason=f"the loss is {loss.item()}", remedy="Check the batches and loss_fn.")
        return loss

    def _split(self, batch: Any, number: int) -> tuple[Any, Any]:
        if self.loss_fn is None:
            return batch, None
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            reason = f"batch {number} is {type(batch).__name__} and not a pair"
            raise CalibrationError(reason=reason, remedy="With loss_fn a batch is (inputs, targets).")
        return batch[0], batch[1]


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Run in evaluation mode; restore flags, buffers, ``requires_grad`` and the random state afterwards."""
    tensors = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    gradients = [(p, p.requires_grad) for p in model.parameters()]
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)), evaluating(model):
        try:
            yield
        finally:
            for module, name, buffer, before in tensors:
                module._buffers[name] = buffer
                if not torch.equal(buffer, before):
                    with torch.no_grad():
                        buffer.copy_(before)
            for parameter, flag in gradients:
                parameter.requires_grad_(flag)


def progress(items: Iterable[Any], label: str) -> Iterable[Any]:
    """Show a bar after the first second, on a terminal and if tqdm is installed."""
    if not sys.stderr.isatty():
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=label, delay=1.0, leave=False)


def _shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    return [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (*args, *kwargs.values())]
