"""The pattern protocol: a weight is cut in tiles of output features, each tile keeps its own units.

DEPrune's DR-form and tile-wise sparsity are one idea. A tile is a run of ``granularity`` kept output
features (channels, for depthwise weights); inside a tile a *unit* is what is pruned as a whole: a K row
in a GEMM (it spans the tile's features), one (channel, dy, dx) tap in DR-form. The planner scores the
units, chooses how many each tile keeps, and the pattern turns counts into a mask and a packed weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from fxprune.config import Config
from fxprune.errors import PackedFormatError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what packed weights are; the last one on GPUs


def kept(mask: Tensor) -> int:
    """Return how many entries of a bool mask are set, or elements of a weight are not zero."""
    return int(torch.count_nonzero(mask))  # twice as fast as a sum of bools


def share(mask: Tensor) -> float:
    """Return what part of a bool mask is set, or of a weight is not zero, 0 to 1."""
    return kept(mask) / max(mask.numel(), 1)


def any_along(mask: Tensor, dim: int) -> Tensor:
    """Return where a bool mask has an entry that is set along ``dim``."""
    bits = mask.view(torch.uint8)  # their largest is found many times faster than any() of bools
    return (bits.amax(dim) if mask.shape[dim] else bits.sum(dim)).bool()


def obeys(values: Tensor, mask: Tensor) -> bool:
    """True when all values that the bool mask of their shape does not keep are zero (-0.0 is, NaN is not)."""
    values = values.detach()
    if values.dtype not in (*FLOATS, torch.float64):  # complex layers have no kernel, but are cut and reported
        values = (values != 0).float()
    return bool(torch.ops.fxprune.zero_outside(values.contiguous(), mask.contiguous()))


@dataclass(frozen=True, eq=False)
class Tiling:
    """How a weight viewed as ``(out_features, in_features)`` is cut.

    ``shape``: (N, K) of a GEMM weight, or (C, KH*KW) of a depthwise weight.
    ``columns``: int64 (N',) kept output features, strictly increasing.
    ``granularity``: output features per tile; the last tile may be narrower.
    ``rows``: bool (tiles, K), the K rows that the units of each tile are counted along (TVW); ``None`` = all.
    """

    shape: tuple[int, int]
    columns: Tensor
    granularity: int
    rows: Tensor | None = None

    @property
    def tiles(self) -> int:
        return -(-len(self.columns) // self.granularity)

    def members(self, tile: int) -> Tensor:
        """Return the output features of one tile, int64."""
        return self.columns[tile * self.granularity : (tile + 1) * self.granularity]


@dataclass(frozen=True)
class Counts:
    """The kept counts a kernel runs without waste: ``minimum, minimum + step, ...`` up to ``maximum``.

    ``maximum`` itself is always legal (a full tile has no waste of its own).
    """

    minimum: int
    maximum: int
    step: int = 1

    def legal(self, count: int) -> bool:
        if not self.minimum <= count <= self.maximum:
            return False
        return count == self.maximum or (count - self.minimum) % self.step == 0


@dataclass(frozen=True, eq=False)
class Packed:
    """A packed weight: named tensors and an integer header (the format of ``docs/ARCHITECTURE.md``)."""

    pattern: str
    header: dict[str, int]
    tensors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class LayerMask:
    """What a planner or an inference decided for one layer.

    ``tiling``: the tiles of the kept output features. ``mask``: bool of ``tiling.shape``, True = kept.
    ``counts``: kept units per tile. ``note``: what recalibration did ("9u8o: over"), or "".
    ``rest``: elements of ``mask`` beside the tiles, which a second kernel adds; ``None`` when there are none.
    ``halved``: of every four consecutive rows of a tile a feature uses at most two, and sparse tensor cores skip the others.
    """

    tiling: Tiling
    mask: Tensor
    counts: tuple[int, ...]
    note: str = ""
    rest: LayerMask | None = None
    halved: bool = False

    @cached_property
    def kept(self) -> int:
        """How many elements the mask keeps."""
        return kept(self.mask)

    @property
    def share(self) -> float:
        """What part of the elements the mask keeps, 0 to 1."""
        return self.kept / max(self.mask.numel(), 1)


@dataclass(frozen=True, eq=False)
class Ask:
    """What a planner asks of a pattern.

    ``importances``: finite element scores >= 0 of each layer's matrix view, by parameter name; ``sparsity``: fraction of
    zeros of each; ``kinds``: its kind. ``unit(kind)``: what the kernel row likes
    (:class:`fxprune.context.Unit`). ``gain(parameter, kept, rounded)``: measured time between two kept counts, or ``None``.
    ``groups``: of convolutions, where they are not 1.
    """

    importances: Mapping[str, Tensor]
    sparsity: Mapping[str, float]
    kinds: Mapping[str, str]
    config: Config
    unit: Callable[[str], Any]
    gain: Callable[[str, int, int], float] | None = None
    groups: Mapping[str, int] = field(default_factory=dict)


class Pattern(Protocol):
    """One sparsity pattern: choose masks, pack, unpack, check.

    ``fixed``: the only sparsity the pattern has (n:m), else ``None``.
    """

    name: str
    kinds: tuple[str, ...]
    fixed: float | None

    def choose(self, ask: Ask) -> dict[str, LayerMask]:
        """Return the mask of every layer asked about."""

    def pack(self, weight: Tensor, mask: Tensor, tiling: Tiling) -> Packed:
        """Pack ``weight`` (of ``tiling.shape``) under ``mask``; kept zeros stay in the pack."""

    def unpack(self, packed: Packed) -> Tensor:
        """Return the dense weight; equals ``weight * mask`` exactly."""

    def check(self, packed: Packed) -> None:
        """Raise :class:`fxprune.errors.PackedFormatError` on any illegal header or index."""


class Counted(Pattern, Protocol):
    """A pattern whose mask follows from a kept count per tile: what a planner may round or trade."""

    def tiles(self, shape: tuple[int, int], granularity: int | None = None) -> Tiling:
        """Return the tiling of a weight of ``shape`` with every output feature kept."""

    def score(self, importance: Tensor, tiling: Tiling) -> list[Tensor]:
        """Return one 1-D tensor of unit scores per tile from element scores of ``tiling.shape``."""

    def unit_size(self, tiling: Tiling, tile: int) -> int:
        """Return how many weight elements one unit of ``tile`` holds."""

    def legal_counts(self, tiling: Tiling, tile: int, step: int = 1) -> Counts:
        """Return the kept counts of ``tile`` that a kernel with K step ``step`` runs without waste."""

    def select(self, scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Return a bool tensor per tile: the ``counts[t]`` largest scores, ties to the lower index."""

    def mask(self, tiling: Tiling, selection: Sequence[Tensor]) -> Tensor:
        """Return the bool mask of ``tiling.shape`` for a selection."""


def rename(packed: Packed, pattern: str) -> Packed:
    """Return the same packed weight as another pattern's."""
    return replace(packed, pattern=pattern)


def keep_largest(scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Return a bool tensor per tile, True at its ``counts[t]`` largest scores, ties to the lower index.

    ``scores``: one 1-D tensor per tile. Raises ``ValueError`` unless ``0 <= counts[t] <= len(scores[t])``.
    """
    if len(scores) != len(counts):
        raise ValueError(f"got {len(counts)} counts for {len(scores)} tiles")
    for tile, (score, count) in enumerate(zip(scores, counts, strict=True)):
        if not 0 <= count <= len(score):
            raise ValueError(f"tile {tile}: got count {count}, expected 0..{len(score)}")
    selection: list[Tensor] = [torch.empty(0, dtype=torch.bool)] * len(scores)
    for size in {len(s) for s in scores}:
        tiles = [t for t, s in enumerate(scores) if len(s) == size]
        stacked = torch.stack([scores[t] for t in tiles])
        order = stacked.argsort(dim=1, descending=True, stable=True)
        wanted = torch.tensor([counts[t] for t in tiles], device=order.device)
        kept = torch.arange(size, device=order.device) < wanted[:, None]
        chosen = torch.zeros_like(kept).scatter_(1, order, kept)
        for row, t in enumerate(tiles):
            selection[t] = chosen[row]
    return selection


def require(ok: bool, what: str, given: object, expected: object) -> None:
    """Raise :class:`PackedFormatError` unless ``ok``."""
    if not ok:
        raise PackedFormatError(what=what, given=given, expected=expected)


def require_layout(packed: Packed, pattern: str, header: Sequence[str], tensors: dict[str, torch.dtype]) -> None:
    """Check the pattern name, the header's keys and integers, and each tensor's name and dtype."""
    require(packed.pattern == pattern, "pattern", packed.pattern, pattern)
    require(set(packed.header) == set(header), "header", sorted(packed.header), sorted(header))
    for key, value in packed.header.items():
        require(type(value) is int and value >= 0, f"header[{key!r}]", value, "an integer >= 0")
    require(set(packed.tensors) == set(tensors), "tensors", sorted(packed.tensors), sorted(tensors))
    for key, dtype in tensors.items():
        tensor = packed.tensors[key]
        require(isinstance(tensor, Tensor), key, type(tensor).__name__, "a tensor")
        require(tensor.layout == torch.strided and tensor.device.type != "meta", key, tensor.layout, "a dense tensor")
        legal = FLOATS if dtype in FLOATS else (dtype,)
        require(tensor.dtype in legal, f"{key} dtype", tensor.dtype, " or ".join(map(str, legal)))
