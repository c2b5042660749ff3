"""What reaches a layer: every call of a weight seen while a model runs, and the inputs its weights multiply."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_OPERANDS = {  # function name -> parameter names; the weight is the operand named "weight"
    "linear": ("input", "weight", "bias"),
    "matmul": ("input", "weight"),
    "mm": ("input", "weight"),
    "addmm": ("bias", "input", "weight"),
    "conv1d": _CONV,
    "conv2d": _CONV,
}
_CHUNK = 1 << 26  # bytes of float64 inputs that are unfolded at a time


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer.

    x: (..., K) of a GEMM, (B, C, H, W) of a convolution, already padded (a 1-D convolution has H = 1).
    transposed: the weight operand is stored (K, N). kernel: ``None`` for a GEMM.
    """

    parameter: str
    x: Tensor
    transposed: bool = False
    kernel: tuple[int, int] | None = None
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class Recorder(TorchFunctionMode):
    """Hand each call of the given weights to ``sink``, wherever it is made: in a module or as a function."""

    def __init__(self, weights: Mapping[str, Tensor], sink: Callable[[Call], None]) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}
        self._sink = sink

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = _OPERANDS.get(getattr(func, "__name__", ""))
        if operands is not None:
            call = self._call(func.__name__, {**dict(zip(operands, args, strict=False)), **(kwargs or {})})
            if call is not None:
                self._sink(call)
        return func(*args, **(kwargs or {}))

    def _call(self, function: str, given: dict[str, Any]) -> Call | None:
        weight = given.get("weight", given.get("other", given.get("mat2")))
        name, swapped = self._names.get(id(weight)), False
        if name is None and isinstance(weight, Tensor) and weight.dim() == 2 and weight._base is not None:
            base = weight._base
            if base.dim() == 2 and weight.shape == base.t().shape and weight.stride() == base.t().stride():
                name, swapped = self._names.get(id(base)), True
        x = given.get("input", given.get("mat1"))
        if name is None or not isinstance(x, Tensor) or not isinstance(weight, Tensor):
            return None
        if function.startswith("conv"):
            return _convolution(name, x, weight, given)
        return Call(name, x, transposed=(function == "linear") == swapped)


def _convolution(name: str, x: Tensor, weight: Tensor, given: dict[str, Any]) -> Call:
    windows = weight.dim() - 2
    if x.dim() == windows + 1:
        x = x[None]
    stride, dilation = (_window(given.get(key, 1), windows) for key in ("stride", "dilation"))
    padding = given.get("padding", 0)
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        sides = [(t // 2, t - t // 2) for t in total]
    else:
        sides = [(p, p) for p in _window(padding, windows)]
    x = F.pad(x, [p for side in reversed(sides) for p in side])
    kernel = tuple(weight.shape[2:])
    if windows == 1:
        x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    return Call(name, x, False, kernel, stride, dilation, given.get("groups", 1))  # type: ignore[arg-type]


def _window(value: Any, dims: int) -> tuple[int, ...]:
    items = (value,) if isinstance(value, int) else tuple(value)
    return items * dims if len(items) == 1 else items


def patches(call: Call) -> Iterator[Tensor]:
    """Yield the inputs in pieces, float64 (groups, K, rows): one column per row of outputs, K as in ``Match.matrix``."""
    if call.kernel is None:
        rows = call.x.detach().reshape(-1, call.x.shape[-1])
        for piece in rows.split(max(1, _CHUNK // (8 * max(rows.shape[1], 1)))):
            yield piece.double().t()[None]
        return
    step = _strided(call)
    taps = call.kernel[0] * call.kernel[1]
    images = max(1, _CHUNK // (8 * taps * max(step[0].numel(), 1))) if len(step) else 1
    for piece in step.split(images):
        columns = piece.double()
        if taps > 1:
            columns = F.unfold(columns, call.kernel, call.dilation, 0, call.stride)
        batch, length = len(piece), columns[0].numel() // max(call.x.shape[1] * taps, 1)
        yield columns.reshape(batch, call.groups, -1, length).permute(1, 2, 0, 3).flatten(2)


def channel_squares(call: Call) -> Tensor:
    """Return the sum of squares of each input channel (of each feature, for a GEMM), float64."""
    x = call.x.detach() if call.kernel is None else _strided(call)
    channel = x.dim() - 1 if call.kernel is None else 1
    return x.double().square().sum([d for d in range(x.dim()) if d != channel])


def _strided(call: Call) -> Tensor:
    """Return the input of a convolution without the pixels that a 1x1 window steps over."""
    x = call.x.detach()
    return x[:, :, :: call.stride[0], :: call.stride[1]] if call.kernel == (1, 1) else x
