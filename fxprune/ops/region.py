"""``fxprune::region``: a chain of operators as one call, from a program of step records. For inference.

    record: code, count, then ``count`` arguments
    depthwise (0): x, weight, taps, bias, kernel h w, stride h w, padding h w, dilation h w, activation
    gemm (1):      x, values, index, tile_ptr, columns, bias, residual, gate, out_features, granularity, feature_dim,
                   activation
    mean (2):      x          over the pixels, (B, C, *) -> (B, C)
    conv (3):      x, values, index, tile_ptr, columns, bias, residual, out_features, granularity, kernel h w, stride h w,
                   padding h w, dilation h w, groups, activation
    max pool (4):  x, kernel h w, stride h w, padding h w, dilation h w
    norm (5):      x, weight, bias, the bits of eps as float32      over the channels
    attention (6): x, k, v, mask, heads, the bits of scale as float32      bfloat16 alone

All values are float32, or all bfloat16. x, residual, gate, k, v and mask are values: first the inputs, then
one per step. Weights are parts of a bundle (``fxprune/ops/bundle.py``); -1 is absent. The operator takes program and layout
as text (:func:`text`), which costs a call nothing, unlike a list of a thousand integers. The program is data: it can be
printed, checked, exported and rebuilt.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxprune.ops import activation, attention, channel_norm, depthwise_taps, tile_conv, tile_gemm
from fxprune.ops.bundle import bundle, unbundle
from fxprune.ops.operator import Args, Operator

aten = torch.ops.aten
DEPTHWISE, GEMM, MEAN, CONV, POOL, NORM, ATTENTION = range(7)
_CALLED: Any = (depthwise_taps, tile_gemm, tile_conv, channel_norm, attention)
PARTS = "fxprune_parts"  # node.meta: the names of the weights in the bundle
_NAMES = dict(enumerate(("depthwise", "gemm", "mean", "conv", "max pool", "norm", "attention")))


def text(integers: Sequence[int]) -> str:
    """Write a program or a layout as the operator takes it."""
    return " ".join(map(str, integers))


@functools.lru_cache(maxsize=64)
def numbers(written: str) -> tuple[int, ...]:
    """Read what :func:`text` wrote."""
    return tuple(map(int, written.split()))


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


def interpret(
    x: Sequence[Tensor],
    part: Callable[..., Tensor],
    program: Sequence[int],
    outputs: Sequence[int],
    depthwise: Callable[..., Tensor],
    gemm: Callable[..., Tensor],
    conv: Callable[..., Tensor],
    norm: Callable[..., Tensor],
    attend: Callable[..., Tensor],
) -> list[Tensor]:
    """Run the steps one by one. part: returns a weight, from its number and, for a matrix, its sizes."""
    values = list(x)

    def value(number: int) -> Tensor | None:
        return values[number] if number >= 0 else None

    def bias(number: int) -> Tensor | None:
        return part(number) if number >= 0 else None

    for code, a in records(program):
        if code == DEPTHWISE:
            operand = _as_image(values[a[0]])
            channels, count = operand.shape[1], a[4] * a[5]
            weights = [part(a[1], channels, count), part(a[2], channels, -(-count // 64)), bias(a[3])]
            windows = [a[4:6], a[6:8], a[8:10], a[10:12]]
            values.append(depthwise(operand, *weights, *windows, activation.NAMES[a[12]]))
        elif code == GEMM:
            operand, residual, gate = values[a[0]], value(a[6]), value(a[7])
            gate = gate.flatten(1) if gate is not None else None
            if a[10] == -1:
                operand = operand.flatten(1)
                residual = residual.flatten(1) if residual is not None else None
            weights = [*map(part, a[1:5]), bias(a[5])]
            values.append(gemm(operand, *weights, residual, gate, a[8], a[9], a[10], activation.NAMES[a[11]]))
        elif code == CONV:
            windows = [a[9:11], a[11:13], a[13:15], a[15:17]]
            operands = [_as_image(values[a[0]]), *map(part, a[1:5]), bias(a[5]), value(a[6])]
            values.append(conv(*operands, a[7], a[8], *windows, a[17], activation.NAMES[a[18]]))
        elif code == POOL:
            values.append(aten.max_pool2d.default(_as_image(values[a[0]]), a[1:3], a[3:5], a[5:7], a[7:9]))
        elif code == NORM:
            values.append(norm(values[a[0]], bias(a[1]), bias(a[2]), float_of(a[3])))
        elif code == ATTENTION:
            values.append(attend(values[a[0]], values[a[1]], values[a[2]], value(a[3]), a[4], float_of(a[5])))
        else:
            values.append(values[a[0]].flatten(2).mean(2, dtype=torch.float32).to(values[a[0]].dtype))
    return [values[i] for i in outputs]


def bits_of(value: float) -> int:
    """Return the bits of a float32, as a program holds it."""
    return int.from_bytes(struct.pack("<f", value), "little")


def float_of(bits: int) -> float:
    return float(struct.unpack("<f", bits.to_bytes(4, "little"))[0])


def parts_of(weights: Sequence[Tensor], layout: Sequence[int], dtype: torch.dtype | None = None) -> Callable[..., Tensor]:
    """Return what :func:`interpret` takes its weights from. dtype: float64 widens them, beside inputs of it."""
    parts = unbundle(weights, layout)
    if dtype == torch.float64:
        parts = [p.to(dtype) if p.is_floating_point() else p for p in parts]
    return lambda number, *sizes: parts[number].view(sizes) if sizes else parts[number]


def _as_image(value: Tensor) -> Tensor:
    """A channel vector (B, C) is an image of one pixel."""
    return value.unflatten(1, (value.shape[1], 1, 1)) if value.dim() == 2 else value


def reference(x: list[Tensor], weights: list[Tensor], layout: str, program: str, outputs: list[int]) -> list[Tensor]:
    """Run the steps on the operators' references. x: (B, C, *), all with one B; weights, layout: a bundle."""
    part = parts_of(weights, numbers(layout), x[0].dtype)
    return interpret(x, part, numbers(program), outputs, *(op.reference for op in _CALLED))


def fake(x: list[Tensor], weights: list[Tensor], layout: str, program: str, outputs: list[int]) -> list[Tensor]:
    def part(number: int, *sizes: int) -> Tensor:
        return weights[0]  # results' sizes follow from the program alone

    shapes = interpret(x, part, numbers(program), outputs, *(op.fake for op in _CALLED))
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
        weights, layout = bundle([*window, bias, *expand, *squeeze])
        x = torch.randn(batch, channels, size, size, generator=gen)
        depthwise = [DEPTHWISE, 13, 0, 0, 1, 2, 3, 3, stride, stride, 1, 1, 1, 1, 2]
        mean = [MEAN, 1, 1]
        gate = [GEMM, 12, 2, 7, 8, 9, 10, 2, -1, -1, channels, 64, -1, 6]
        project = [GEMM, 12, 1, 3, 4, 5, 6, -1, 0 if stride == 1 else -1, 3, channels, 4, 1, 0]
        outputs = [4] if stride == 1 else [1, 4]
        yield [x], weights, text(layout), text([*depthwise, *mean, *gate, *project]), outputs
    stem = tile_gemm.tile_pack.random_structure(6, 27, 4, gen)
    head = tile_gemm.tile_pack.random_structure(5, 6, 8, gen)
    weights, layout = bundle([*stem, torch.randn(6, generator=gen), *head])
    conv = [CONV, 19, 0, 0, 1, 2, 3, 4, -1, 6, 4, 3, 3, 2, 2, 1, 1, 1, 1, 1, 2]
    pool = [POOL, 9, 1, 3, 3, 2, 2, 1, 1, 1, 1]
    gemm = [GEMM, 12, 2, 5, 6, 7, 8, -1, -1, -1, 5, 8, 1, 0]
    yield [torch.randn(2, 3, 9, 7, generator=gen)], weights, text(layout), text([*conv, *pool, *gemm]), [3]


def bad_samples() -> Iterator[tuple[Args, str]]:
    x, weights, layout, program, outputs = next(samples())
    yield ([], weights, layout, program, outputs), r"input"
    yield ([x[0].double()], weights, layout, program, outputs), r"float32"
    yield (x, [weights[0].double(), *weights[1:]], layout, program, outputs), r"weights must be float32"
    yield (x, [weights[0][:-16], *weights[1:]], layout, program, outputs), r"beyond the end of weights\[0\]"
    yield (x, weights, f"-8 {layout}", program, outputs), r"no size and tensor"
    yield (x, weights[:2], layout, program, outputs), r"no size and tensor of 2"
    yield (x, weights, text(numbers(layout)[:5]), program, outputs), r"weight .* of 5 does not exist"
    code = numbers(program)
    yield (x, weights, layout, text([*code[:5], 1, *code[6:]]), outputs), r"bias must be float32"
    yield (x, weights, layout, text(code[:-1]), outputs), r"program"
    yield (x, weights, layout, program.replace(" ", "  ", 1), outputs), r"program must hold integers"
    yield (x, weights, layout, "7 0", outputs), r"code"
    yield (x, weights, layout, program, [0]), r"outputs"
    yield (x, weights, layout, text([MEAN, 1, 5]), outputs), r"value"


OPERATOR = Operator("region", reference, fake, setup_context, backward, samples, bad_samples)
