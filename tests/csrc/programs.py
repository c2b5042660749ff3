"""Random programs for ``fxprune::region``, right ones and corrupted ones. One seed, one program."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from fxprune.ops import activation
from fxprune.ops.bundle import bundle
from fxprune.ops.region import CONV, DEPTHWISE, GEMM, MEAN, POOL, text
from tests.integers import bitmap, generator, integers, tiles

Program = tuple[list[Tensor], list[Tensor], list[int], list[int], list[int]]
_EXACT = [activation.NAMES.index(name) for name in ("relu6", "relu6", "relu", "none")]
# powers of two, so that a mean is exact; the others only lack a mean
_SIDES = ((8, 8), (4, 16), (1, 8), (16, 16), (7, 5), (1, 1), (9, 3))


class Writer:
    """Writes a random program step by step; ``values`` are the shapes without the batch."""

    def __init__(self, seed: int) -> None:
        self.rng, self.gen = random.Random(seed), generator(seed)
        self.packed: list[Tensor] = []
        self.code: list[int] = []
        self.batch = self.rng.choice((1, 1, 2, 3, 5))
        side = self.rng.choice(_SIDES)
        self.x = [self._input(self.rng.randint(1, 12), *side) for _ in range(self.rng.randint(1, 2))]
        self.values = [tuple(t.shape[1:]) for t in self.x]

    def program(self) -> Program:
        inputs, steps = len(self.x), self.rng.randint(1, 8)
        kinds = (self.depthwise, self.gemm, self.gemm, self.mean, self.conv, self.pool)
        for _ in range(steps):
            self.rng.choice(kinds)()
        if not self.code:
            self.gemm()
        made = range(inputs, len(self.values))
        outputs = sorted({len(self.values) - 1, *(i for i in made if self.rng.random() < 0.2)})
        return self.x, *bundle(self.packed), self.code, outputs

    def depthwise(self) -> None:
        number = self._pick([i for i, v in enumerate(self.values) if len(v) == 3])
        c, *size = self.values[number]
        kernel, stride = (self.rng.choice((1, 3, 5)) for _ in range(2)), self.rng.choice((1, 1, 2))
        kernel = list(kernel)
        padding = [k // 2 for k in kernel]
        mask = torch.rand(c, kernel[0] * kernel[1], generator=self.gen) < 0.6
        weights = [self._keep(integers(self.gen, c, mask.shape[1]) * mask), self._keep(bitmap(mask)), self._bias(c)]
        record = [number, *weights, *kernel, stride, stride, *padding, 1, 1, self.rng.choice(_EXACT)]
        self._add(DEPTHWISE, record, (c, *((s - 1) // stride + 1 for s in size)))

    def conv(self) -> None:
        number = self._pick([i for i, v in enumerate(self.values) if len(v) == 3])
        c, *size = self.values[number]
        kernel, stride = [self.rng.choice((1, 3, 5)) for _ in range(2)], self.rng.choice((1, 1, 2))
        padding, dilation = [k // 2 for k in kernel], 1 if min(size) < 8 else self.rng.choice((1, 1, 2))
        padding = [p * dilation for p in padding]
        out = [(s - 1) // stride + 1 for s in size]
        n, g = self.rng.randint(1, 20), self.rng.choice((1, 4, 8, 16))
        n = self.rng.choice([n, *(v[0] for v in self.values if list(v[1:]) == out)])
        _, packed = tiles(self.gen, n, c * kernel[0] * kernel[1], g, columns=self.rng.choice((1.0, 1.0, 0.6)))
        alike = [i for i, v in enumerate(self.values) if v == (n, *out)]
        operands = [self._keep(t) for t in packed]
        window = [*kernel, stride, stride, *padding, dilation, dilation, 1]
        record = [number, *operands, self._bias(n), self.rng.choice([-1, *alike]), n, g, *window, self.rng.choice(_EXACT)]
        self._add(CONV, record, (n, *out))

    def gemm(self) -> None:
        number = self._pick(range(len(self.values)))
        k, *size = self.values[number]
        n, g = self.rng.randint(1, 20), self.rng.choice((1, 4, 8, 16, 64))
        same = [v[0] for v in self.values if v[1:] == tuple(size)]
        n = self.rng.choice([n, n, *same])
        _, packed = tiles(self.gen, n, k, g, columns=self.rng.choice((1.0, 1.0, 0.6)))
        alike = [i for i, v in enumerate(self.values) if v == (n, *size)]
        gates = [i for i, v in enumerate(self.values) if v == (k,) and size]
        residual, gate = (self.rng.choice([-1, *found]) for found in (alike, gates))
        operands = [self._keep(t) for t in packed]
        tail = [residual, gate, n, g, 1 if size else -1, self.rng.choice(_EXACT)]
        self._add(GEMM, [number, *operands, self._bias(n), *tail], (n, *size))

    def pool(self) -> None:
        number = self._pick([i for i, v in enumerate(self.values) if len(v) == 3])
        c, *size = self.values[number]
        kernel = [self.rng.choice((1, 2, 3, 5)) for _ in range(2)]
        stride, padding = [self.rng.choice((1, 2, 3)) for _ in range(2)], [self.rng.randint(0, k // 2) for k in kernel]
        extents = [s + 2 * p - k for s, p, k in zip(size, padding, kernel, strict=True)]
        if min(extents) >= 0:
            out = [e // s + 1 for e, s in zip(extents, stride, strict=True)]
            self._add(POOL, [number, *kernel, *stride, *padding, 1, 1], (c, *out))

    def mean(self) -> None:
        images = [i for i, v in enumerate(self.values) if len(v) == 3 and (v[1] * v[2]).bit_count() == 1]
        if images:
            number = self.rng.choice(images)
            self._add(MEAN, [number], self.values[number][:1])

    def _pick(self, numbers: range | list[int]) -> int:
        """The latest value more often than not."""
        return self.rng.choice([*numbers, numbers[-1], numbers[-1]])

    def _add(self, code: int, record: list[int], shape: tuple[int, ...]) -> None:
        self.code += [code, len(record), *record]
        self.values.append(shape)

    def _keep(self, tensor: Tensor) -> int:
        self.packed.append(tensor)
        return len(self.packed) - 1

    def _bias(self, n: int) -> int:
        return self._keep(integers(self.gen, n)) if self.rng.random() < 0.7 else -1

    def _input(self, c: int, h: int, w: int) -> Tensor:
        """Contiguous, channels last, transposed, strided or broadcast."""
        x = integers(self.gen, self.batch, c, h, w)
        views = (
            x,
            x.to(memory_format=torch.channels_last),
            x.mT.contiguous().mT,
            torch.stack((x, x), -1)[..., 0],
            x[:1].expand(self.batch, -1, -1, -1),
        )
        return self.rng.choice(views)


def program(seed: int) -> Program:
    return Writer(seed).program()


def as_text(case: Program) -> tuple[list[Tensor], list[Tensor], str, str, list[int]]:
    """Return the operator's arguments."""
    x, weights, layout, code, outputs = case
    return x, weights, text(layout), text(code), outputs


# around every bound that a check could miss by one; nothing between, where a legal size would take minutes
_NUMBERS = (*range(-3, 24), 63, 64, 65, 2**31 - 1, 2**31, 2**40, 2**61, 2**62, 2**63 - 1, -(2**31), -(2**62), -(2**63))


def corrupted(seed: int) -> Program:
    """A right program with up to three integers replaced, or records cut, repeated or swapped."""
    x, weights, layout, code, outputs = program(seed)
    rng = random.Random(~seed)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(code)) if code else 0
        way = rng.randrange(8)
        if way < 5 and code:
            code[at] = rng.choice(_NUMBERS)
        elif way == 5:
            code = code[:at] + code[at + 1 :]
        elif way == 6:
            code = code[:at] + [rng.choice(_NUMBERS)] + code[at:]
        else:
            outputs = [rng.choice(_NUMBERS) for _ in range(rng.randint(0, 3))]
    return x, weights, layout, code, outputs
