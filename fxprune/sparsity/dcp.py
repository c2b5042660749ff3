"""DEPrune (NeurIPS 2024): prune single taps of depthwise weights, balanced over groups of channels.

In DR-form (Sec. 4.1) a group of 32 channels is one GEMM with one K index per (channel, dy, dx) and one
non-zero per K index, so zeroing one tap removes one K index. DCP (Sec. 4.2) prunes the smallest taps of a
layer; BWT (Sec. 5.1) prunes the same ratio in every group; HSR (Sec. 5.2) aligns the kept counts to the
hardware tile and lives in :mod:`fxprune.sparsity.recalibrate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fxprune.errors import ConfigError, NonFiniteWeight, TileMismatch
from fxprune.sparsity.pattern import (
    Ask,
    Counts,
    LayerMask,
    Packed,
    Tiling,
    keep_largest,
    require,
    require_layout,
)
from fxprune.sparsity.recalibrate import TOLERANCE, Kept, Recalibration, recalibrate_counts
from fxprune.sparsity.tile_plan import require_dtype, require_shape

GROUP = 32  # channels per DR group: the GPU tile of the paper, Sec. 4.1
_NEAR = 0.005  # of the weights: how far the achieved sparsity of a model may be from what was asked
WORD = 64  # taps per bit word of the packed format


class Dcp:
    """Taps of a depthwise weight, viewed as (C, KH*KW); a tile is a group of channels, a unit is one tap."""

    name = "dcp"
    kinds: tuple[str, ...] = ("depthwise",)
    fixed: float | None = None

    def choose(self, ask: Ask) -> dict[str, LayerMask]:
        """Recalibrate with the paper's tile, or with the largest half of it that meets the target.

        A whole network meets it at once; one small layer has too few taps for multiples of 32 per group.
        """
        config, tile, least = ask.config, GROUP, ask.unit("depthwise").k_step
        wanted = sum((1.0 - ask.sparsity[name]) * scores.numel() for name, scores in ask.importances.items())
        total = max(sum(scores.numel() for scores in ask.importances.values()), 1)
        while True:
            masks = plan_layers(
                ask.importances,
                ask.sparsity,
                group=config.group,
                balance=config.balance,
                recalibration=config.recalibration,
                tile=tile,
                gain=ask.gain if config.recalibration == "deprune" else None,
            )
            kept = sum(int(layer.mask.sum()) for layer in masks.values())
            if abs(kept - wanted) <= _NEAR * total or tile // 2 < least or config.recalibration == "off":
                return masks
            tile //= 2

    def tiles(self, shape: Sequence[int], granularity: int | None = None) -> Tiling:
        """Cut (C, KH*KW) or (C, 1, KH, KW) in groups of ``granularity`` channels (32 by default)."""
        group = GROUP if granularity is None else granularity
        if len(shape) > 2 and shape[1] != 1:
            reason = f"it has {shape[1]} inputs per channel, so it is not depthwise"
            raise TileMismatch(shape=tuple(shape), granularity=group, reason=reason, remedy="Use pattern 'tile'.")
        if len(shape) < 2 or group < 1 or math.prod(shape[1:]) < 1:
            reason = "a depthwise weight is (C, 1, KH, KW) or (C, KH*KW), and a group has at least 1 channel"
            raise TileMismatch(shape=tuple(shape), granularity=group, reason=reason, remedy="The default group is 32.")
        return Tiling((shape[0], math.prod(shape[1:])), torch.arange(shape[0]), group)

    def score(self, importance: Tensor, tiling: Tiling) -> list[Tensor]:
        """Return per group the scores of its taps, channel by channel: the order of DR-form's K indices."""
        size = tiling.granularity * tiling.shape[1]
        return list(_taps(importance, tiling).flatten().split(size))[: tiling.tiles]

    def unit_size(self, tiling: Tiling, tile: int) -> int:
        """Return 1: a unit is one weight."""
        return 1

    def legal_counts(self, tiling: Tiling, tile: int, step: int = 1) -> Counts:
        """Return multiples of ``step`` up to the taps of the group; a group never loses all its taps."""
        size = len(tiling.members(tile)) * tiling.shape[1]
        return Counts(min(step, size), size, step)

    def select(self, scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
        """Return a bool tensor per group: its ``counts[t]`` largest taps, ties to the lower index."""
        return keep_largest(scores, counts)

    def mask(self, tiling: Tiling, selection: Sequence[Tensor]) -> Tensor:
        """Return bool (C, KH*KW)."""
        if not selection:
            return torch.zeros(tiling.shape, dtype=torch.bool)
        return torch.cat(list(selection)).reshape(tiling.shape)

    def pack(self, weight: Tensor, mask: Tensor, tiling: Tiling) -> Packed:
        """Return ``weight`` f32 (C, KH*KW) with pruned = 0, and ``taps`` int64 (C, ceil(KH*KW/64)) bit words."""
        require_dtype(weight, tiling)
        kept = _taps(mask, tiling).bool()
        dense = _taps(weight.detach(), tiling)
        tensors = {"weight": torch.where(kept, dense, dense.new_zeros(())), "taps": tap_words(kept)}
        channels, taps = tiling.shape
        header = {"channels": channels, "taps": taps, "group": tiling.granularity}
        return Packed(self.name, header, tensors)

    def unpack(self, packed: Packed) -> Tensor:
        """Return the dense (C, KH*KW) weight, zero where no tap is kept."""
        self.check(packed)
        return packed.tensors["weight"].clone()

    def check(self, packed: Packed) -> None:
        """Raise :class:`PackedFormatError` on a bad header, shape, stray tap bit or non-zero pruned weight."""
        require_layout(packed, self.name, ("channels", "taps", "group"), {"weight": torch.float32, "taps": torch.int64})
        channels, count = packed.header["channels"], packed.header["taps"]
        require(packed.header["group"] >= 1, "header['group']", packed.header["group"], "at least 1")
        weight, words = packed.tensors["weight"], packed.tensors["taps"]
        require(weight.shape == (channels, count), "weight shape", tuple(weight.shape), (channels, count))
        shape = (channels, -(-count // WORD))
        require(words.shape == shape, "taps shape", tuple(words.shape), shape)
        kept = _bits(words, count)
        require(torch.equal(tap_words(kept), words), "taps", "bits past the last tap", f"bits below {count}")
        stray = int(((weight != 0) & ~kept).sum())
        require(stray == 0, "weight", f"{stray} non-zero pruned taps", "0 where no tap is kept")


def plan_layers(
    importances: Mapping[str, Tensor],
    sparsity: Mapping[str, float],
    *,
    group: int = GROUP,
    balance: bool = True,
    recalibration: str = "deterministic",
    tile: int = 32,
    gain: Callable[[str, int, int], float] | None = None,
    step: int = 1,
) -> dict[str, LayerMask]:
    """Choose the kept taps of all depthwise layers of a model.

    importances: element scores (C, T) by layer; the largest are kept, ties to the lower index.
    sparsity: fraction of zeros by layer. balance: the same ratio in every group (BWT, Sec. 5.1), else one
    threshold per layer (DCP, Sec. 4.2: exactly ``n - round(sparsity * n)`` taps stay, at least 1 a group).
    recalibration: "off"; "deterministic": kept counts per group become multiples of ``tile`` while the total
    sparsity stays within 0.3 points; "deprune": HSR (Sec. 5.2) by ``gain(layer, kept, floor)``, the time that
    rounding the layer down saves. HSR fixes how many layers are rounded down, so where that misses the
    target by more than 0.3 points, and where there is no ``gain``, "deprune" is "deterministic".
    step: multiple of kept counts the kernel needs; it holds in every mode.

    Raises :class:`ConfigError` and :class:`NonFiniteWeight`.
    """
    if recalibration not in ("deprune", "off", "deterministic"):
        raise ConfigError(name="recalibration", given=recalibration, expected="'deprune', 'off' or 'deterministic'")
    pattern = Dcp()
    tilings, scores, kept, wanted = {}, {}, {}, 0.0
    for name, importance in importances.items():
        ratio = _ratio(name, sparsity)
        tiling = tilings[name] = pattern.tiles(importance.shape, group)
        bad = int((~torch.isfinite(importance)).sum())
        if bad:
            raise NonFiniteWeight(name=name, count=bad)
        scores[name] = pattern.score(importance.detach(), tiling)
        sizes = tuple(len(s) for s in scores[name])
        counts = _balanced(sizes, ratio) if balance else _threshold(scores[name], ratio)
        kept[name] = Kept(counts, sizes)
        wanted += (1.0 - ratio) * sum(sizes)
    total = sum(sum(k.sizes) for k in kept.values())
    target = 1.0 - wanted / max(total, 1)
    result = _recalibrate(kept, recalibration, tile, gain, step, target)
    plan = {}
    for name, tiling in tilings.items():
        counts = result.counts[name] if result else kept[name].counts
        mask = pattern.mask(tiling, pattern.select(scores[name], counts))
        plan[name] = LayerMask(tiling, mask, counts, result.note(name) if result else "")
    return plan


def _recalibrate(
    kept: dict[str, Kept],
    mode: str,
    tile: int,
    gain: Callable[[str, int, int], float] | None,
    step: int,
    target: float,
) -> Recalibration | None:
    unit = step if mode == "off" else math.lcm(tile, step)
    if unit == 1:
        return None
    if mode == "deprune" and gain is not None:
        result = recalibrate_counts(kept, unit, gain)
        if abs(result.sparsity - target) <= TOLERANCE:
            return result
    return recalibrate_counts(kept, unit, target=target)


def _balanced(sizes: Sequence[int], ratio: float) -> tuple[int, ...]:
    """BWT: the same ratio in every group, and at least one tap."""
    return tuple(max(size - round(ratio * size), min(1, size)) for size in sizes)


def _threshold(scores: Sequence[Tensor], ratio: float) -> tuple[int, ...]:
    """DCP: rank the whole layer; the best tap of each group is safe, so that no group disappears."""
    if not scores:
        return ()
    flat = torch.cat(list(scores)).double()
    sizes = [len(s) for s in scores]
    start = 0
    for score in scores:
        flat[start + int(score.argmax())] = torch.inf
        start += len(score)
    count = max(len(flat) - round(ratio * len(flat)), len(scores))
    (chosen,) = keep_largest([flat], [count])
    return tuple(int(part.sum()) for part in chosen.split(sizes))


def _ratio(name: str, sparsity: Mapping[str, float]) -> float:
    ratio = sparsity.get(name)
    if ratio is None or not 0.0 <= ratio < 1.0:
        raise ConfigError(name=f"sparsity[{name!r}]", given=ratio, expected="a fraction of zeros, 0 <= sparsity < 1")
    return float(ratio)


def _taps(tensor: Tensor, tiling: Tiling) -> Tensor:
    """View a (C, KH*KW) or (C, 1, KH, KW) tensor as ``tiling.shape``."""
    if tensor.shape[0] != tiling.shape[0] or tensor.numel() != math.prod(tiling.shape):
        require_shape(tensor, tiling)
    return tensor.reshape(tiling.shape)


def infer(weight: Tensor, group: int = 32) -> LayerMask:
    """Find the kept taps in the zeros of ``weight`` (C, KH*KW), for weights without a plan (-0.0 is zero)."""
    tiling = Dcp().tiles(tuple(weight.shape), group)
    mask = weight.detach() != 0
    counts = tuple(int(mask[tiling.members(t)].sum()) for t in range(tiling.tiles))
    return LayerMask(tiling, mask, counts)


def tap_words(kept: Tensor) -> Tensor:
    """bool (C, T) -> int64 (C, ceil(T/64)); bit t % 64 of word t // 64 is tap t."""
    channels, count = kept.shape
    words = -(-count // WORD)
    padded = torch.nn.functional.pad(kept.long(), (0, words * WORD - count))
    shift = torch.arange(WORD, device=kept.device)
    return (padded.reshape(channels, words, WORD) << shift).sum(2)


def _bits(words: Tensor, count: int) -> Tensor:
    """int64 (C, ceil(count/64)) -> bool (C, count)."""
    tap = torch.arange(count, device=words.device)
    return ((words[:, tap // WORD] >> (tap % WORD)) & 1).bool()
