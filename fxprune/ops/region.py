"""``fxprune::region``: a chain of operators as one call, from a program of step records. For inference.

    record: code, count, then ``count`` arguments
    depthwise (0): x, weight, taps, bias, kernel h w, stride h w, padding h w, dilation h w, activation
    gemm (1):      x, values, index, tile_ptr, columns, bias, residual, gate, out_features, granularity, feature_dim,
                   activation
    mean (2):      x          over the pixels, (B, C, *) -> (B, C)
    conv (3):      x, values, index, tile_ptr, columns, bias, residual, out_features, granularity, kernel h w, stride h w,
                   padding h w, dilation h w, groups, activation

All values are float32, or all bfloat16 (no conv then). x, residual and gate are values: first the inputs, then one per step.
Weights are indices into ``packed``; -1 is absent. The program is data: it can be printed, checked, exported and rebuilt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.ops import activation, depthwise_taps, tile_conv, tile_gemm
from fxprune.ops.operator import Args, Operator

DEPTHWISE, GEMM, MEAN, CONV = 0, 1, 2, 3
_NAMES = {DEPTHWISE: "depthwise", GEMM: "gemm", MEAN: "mean", CONV: "conv"}


def records(program: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Yield (code, arguments) of each step."""
    at = 0
    while at < len(program):
        count = program[at + 1]
        yield program[at], list(program[at + 2 : at + 2 + count])
        at += 2 + count


def describe(program: Sequence[int]) -> str:
    """Return the program as one line per step."""
    return "\n".join(f"{_NAMES.get(code, code)} {arguments}" for code, arguments in records(program))


def _interpret(
    x: Sequence[Tensor],
    packed: Sequence[Tensor],
    program: Sequence[int],
    outputs: Sequence[int],
    depthwise: Callable[..., Tensor],
    gemm: Callable[..., Tensor],
    conv: Callable[..., Tensor],
) -> list[Tensor]:
    values = list(x)

    def optional(items: Sequence[Tensor], position: int) -> Tensor | None:
        return items[position] if position >= 0 else None

    for code, a in records(program):
        if code == DEPTHWISE:
            windows = [a[4:6], a[6:8], a[8:10], a[10:12]]
            operands = [packed[a[1]], packed[a[2]], optional(packed, a[3])]
            values.append(depthwise(_as_image(values[a[0]]), *operands, *windows, activation.NAMES[a[12]]))
        elif code == GEMM:
            operand, residual, gate = values[a[0]], optional(values, a[6]), optional(values, a[7])
            gate = gate.flatten(1) if gate is not None else None
            if a[10] == -1:
                operand = operand.flatten(1)
                residual = residual.flatten(1) if residual is not None else None
            operands = [*(packed[i] for i in a[1:5]), optional(packed, a[5]), residual, gate]
            values.append(gemm(operand, *operands, a[8], a[9], a[10], activation.NAMES[a[11]]))
        elif code == CONV:
            windows = [a[9:11], a[11:13], a[13:15], a[15:17]]
            operands = [*(packed[i] for i in a[1:5]), optional(packed, a[5]), optional(values, a[6])]
            values.append(conv(_as_image(values[a[0]]), *operands, a[7], a[8], *windows, a[17], activation.NAMES[a[18]]))
        else:
            values.append(values[a[0]].flatten(2).mean(2, dtype=torch.float32).to(values[a[0]].dtype))
    return [values[i] for i in outputs]


def _as_image(value: Tensor) -> Tensor:
    """A channel vector (B, C) is an image of one pixel."""
    return value.unflatten(1, (value.shape[1], 1, 1)) if value.dim() == 2 else value


def reference(x: list[Tensor], packed: list[Tensor], program: list[int], outputs: list[int]) -> list[Tensor]:
    """Run the steps one by one on the operators' references; inputs are (B, C, *), all with one B."""
    return _interpret(x, packed, program, outputs, depthwise_taps.reference, tile_gemm.reference, tile_conv.reference)


def fake(x: list[Tensor], packed: list[Tensor], program: list[int], outputs: list[int]) -> list[Tensor]:
    shapes = _interpret(x, packed, program, outputs, depthwise_taps.fake, tile_gemm.fake, tile_conv.fake)
    return [s.new_empty(s.shape) for s in shapes]


def setup_context(ctx: Any, inputs: Args, output: list[Tensor]) -> None:
    return None


def backward(ctx: Any, *grads: Tensor) -> Args:
    """Refuse: training graphs keep their operators apart."""
    raise RuntimeError(
        "fxprune::region has no gradient: regions are formed for inference only. Compile with gradients enabled."
    )


def samples() -> Iterator[Args]:
    """A depthwise-separable block with squeeze-and-excite and a residual; one with a strided depthwise step; a stem."""
    gen = torch.Generator().manual_seed(0)
    for batch, channels, size, stride in ((1, 6, 8, 1), (3, 5, 8, 2)):
        window = depthwise_taps.random_taps(channels, 9, gen)
        expand = tile_gemm.tile_pack.random_structure(channels, channels, 4, gen)
        squeeze = tile_gemm.tile_pack.random_structure(channels, channels, 64, gen)
        bias = torch.randn(channels, generator=gen)
        packed = [*window, bias, *expand, *squeeze]
        x = torch.randn(batch, channels, size, size, generator=gen)
        depthwise = [DEPTHWISE, 13, 0, 0, 1, 2, 3, 3, stride, stride, 1, 1, 1, 1, 2]
        mean = [MEAN, 1, 1]
        gate = [GEMM, 12, 2, 7, 8, 9, 10, 2, -1, -1, channels, 64, -1, 6]
        project = [GEMM, 12, 1, 3, 4, 5, 6, -1, 0 if stride == 1 else -1, 3, channels, 4, 1, 0]
        yield [x], packed, [*depthwise, *mean, *gate, *project], [4] if stride == 1 else [1, 4]
    stem = tile_gemm.tile_pack.random_structure(6, 27, 4, gen)
    head = tile_gemm.tile_pack.random_structure(5, 6, 8, gen)
    conv = [CONV, 19, 0, 0, 1, 2, 3, 4, -1, 6, 4, 3, 3, 2, 2, 1, 1, 1, 1, 1, 2]
    gemm = [GEMM, 12, 1, 5, 6, 7, 8, -1, -1, -1, 5, 8, 1, 0]
    yield [torch.randn(2, 3, 9, 7, generator=gen)], [*stem, torch.randn(6, generator=gen), *head], [*conv, *gemm], [2]


def bad_samples() -> Iterator[tuple[Args, str]]:
    x, packed, program, outputs = next(samples())
    yield ([], packed, program, outputs), r"input"
    yield ([x[0].double()], packed, program, outputs), r"float32"
    yield (x, packed[:5], program, outputs), r"packed"
    yield (x, packed, program[:-1], outputs), r"program"
    yield (x, packed, [7, 0], outputs), r"code"
    yield (x, packed, program, [0]), r"outputs"
    yield (x, packed, [MEAN, 1, 5], outputs), r"value"


OPERATOR = Operator("region", reference, fake, setup_context, backward, samples, bad_samples)
