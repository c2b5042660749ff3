"""Which output features and K rows tile-wise sparsity (SC'20) keeps: ranking, quantiles, guards; columns, then rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fxprune.errors import ConfigError, NonFiniteWeight, TileMismatch
from fxprune.sparsity.elements import keep_elements
from fxprune.sparsity.pattern import FLOATS, LayerMask, Tiling, keep_largest
from fxprune.sparsity.recalibrate import ceil_to, choose, floor_to

GRANULARITY = 64  # output features per tile: four AVX-512 registers
_SLACK = 0.001  # of a plan's weights: how far rounding rows to a step may move the sparsity


def full_tiling(shape: Sequence[int], granularity: int | None = None) -> Tiling:
    """Cut (N, K) in tiles of ``granularity`` output features (64 by default), all of them kept."""
    granularity = GRANULARITY if granularity is None else granularity
    if len(shape) != 2 or granularity < 1:
        raise mismatch(shape, granularity, "a GEMM weight is (N, K) and a tile has at least 1 output feature")
    return Tiling((shape[0], shape[1]), torch.arange(shape[0]), granularity)


def width_in_groups(features: int, groups: int, wanted: int) -> int:
    """Return ``wanted`` output features per tile, or fewer, so that with convolution groups a tile lies inside one."""
    if groups == 1:
        return wanted
    return divisor(features // groups, wanted)


def divisor(size: int, most: int) -> int:
    """Return the largest divisor of ``size`` that is at most ``most``."""
    return max(width for width in range(1, min(size, most) + 1) if size % width == 0)


def expand_rows(tiling: Tiling, selection: Sequence[Tensor] | Tensor) -> Tensor:
    """Return bool (N, K): a weight is kept when its output feature and its row in that tile are.

    selection: bool (K,) of each tile.
    """
    n, k = tiling.shape
    if not len(selection):
        return torch.zeros(n, k, dtype=torch.bool)
    rows = selection if isinstance(selection, Tensor) else torch.stack(list(selection))
    inside = rows.repeat_interleave(tiling.granularity, 0)[: len(tiling.columns)]
    if len(inside) == n:
        return inside
    return torch.zeros(n, k, dtype=torch.bool).index_copy_(0, tiling.columns, inside)


@dataclass(frozen=True)
class _Layer:
    name: str
    importance: Tensor
    ratio: float
    granularity: int
    columns: bool
    apriori: float = 0.0

    @property
    def prior(self) -> Tensor | None:
        """The element-wise mask (N, K) as 0 and 1, when there is apriori tuning."""
        if not self.apriori:
            return None
        (kept,) = keep_elements([self.importance], self.importance.numel() - round(self.ratio * self.importance.numel()))
        return kept.float()

    @property
    def column_ratio(self) -> float:
        """Half of the split: columns and rows lose the same share, together ``ratio``."""
        return 1.0 - math.sqrt(1.0 - self.ratio) if self.columns else 0.0


def plan_layers(
    importances: Mapping[str, Tensor],
    sparsity: Mapping[str, float],
    *,
    granularity: Mapping[str, int] | int = GRANULARITY,
    columns: Mapping[str, bool] | bool = True,
    scope: str = "layer",
    ranking: str = "corrected",
    step: Mapping[str, int] | int = 1,
    column_step: int | None = None,
    apriori: float = 0.0,
) -> dict[str, LayerMask]:
    """Choose kept output features and kept rows per tile (SC'20, "Pruning Algorithm").

    importances: element scores >= 0, (N, K) by layer. sparsity: fraction of zeros by layer.
    columns: True removes output features, then rows (2-D); False removes rows only, from fixed tiles (1-D).
    scope: "layer" ranks each layer alone; "global" ranks all, towards the element-weighted mean sparsity.
    ranking: "corrected" compares RMS scores over kept columns, counts elements and keeps at least one column
    and one row per tile, so the sparsity asked for is met; "published" divides norms by the length and counts
    vectors, as the authors' code does, which overshoots and may delete a whole layer.
    step: rows per tile of a layer become multiples of it (HSR), nearest first, total unchanged. column_step: kept output
    features become multiples of it, never fewer than one step; ``None`` is 1.
    apriori: share of the columns, and of the rows of all tiles, that is settled before the ranking ("apriori tuning"): an
    element-wise mask of the same sparsity says how dense each is; the densest share stays, the emptiest share goes.

    Raises :class:`ConfigError`, :class:`TileMismatch` and :class:`NonFiniteWeight`.
    """
    for option, given, legal in (
        ("scope", scope, ("layer", "global")),
        ("ranking", ranking, ("corrected", "published")),
    ):
        if given not in legal:
            raise ConfigError(name=option, given=given, expected=f"one of {', '.join(legal)}")
    steps = {name: step if isinstance(step, int) else step[name] for name in importances}
    for option, value in (("step", min(steps.values(), default=1)), ("column_step", column_step or 1)):
        if value < 1:
            raise ConfigError(name=option, given=value, expected="an integer >= 1")
    most = min([0.5, *(min(s, 1.0 - s) for s in sparsity.values())]) if sparsity and apriori else 0.0
    if not 0.0 <= apriori <= most:
        raise ConfigError(
            name="apriori", given=apriori, expected=f"0 <= apriori <= {most:g}, what is dropped and what is kept"
        )
    layers = {}
    for name, importance in importances.items():
        ratio = sparsity.get(name, -1.0)
        if not 0.0 <= ratio < 1.0:
            raise ConfigError(name=f"sparsity[{name!r}]", given=sparsity.get(name), expected="0 <= sparsity < 1")
        width = granularity if isinstance(granularity, int) else granularity[name]
        full_tiling(tuple(importance.shape), width)
        if not importance.numel():
            raise mismatch(importance.shape, width, "it has no elements", "Exclude it with ignored_layers.")
        two_dimensional = columns if isinstance(columns, bool) else columns[name]
        layers[name] = _Layer(name, ranked(importance), ratio, width, two_dimensional, apriori)
    groups = [list(layers)] if scope == "global" and layers else [[name] for name in layers]
    plan: dict[str, LayerMask] = {}
    for names in groups:
        chosen = [layers[name] for name in names]
        tilings = _plan_columns(chosen, ranking, column_step or 1)
        plan.update(zip(names, _plan_rows(chosen, tilings, ranking, [steps[name] for name in names]), strict=True))
    return plan


def _plan_columns(layers: Sequence[_Layer], ranking: str, step: int) -> list[Tiling]:
    """Rank the output features of all layers given together and round each layer's number to ``step``."""
    tilings = [full_tiling(tuple(layer.importance.shape), layer.granularity) for layer in layers]
    pruned = [i for i, layer in enumerate(layers) if layer.columns]
    if not pruned:
        return tilings
    norms = {i: _norms(layers[i]) for i in pruned}
    corrected = ranking == "corrected"
    scores, weights, budget = [], [], 0.0
    for i, norm in list(norms.items()):
        n, k = tilings[i].shape
        score = norm / math.sqrt(k) if corrected else norm / k
        prior = layers[i].prior
        if prior is not None:
            score = norms[i] = _settled(score, prior.mean(1), layers[i].apriori)
        scores.append(score[None])
        weights.append(torch.tensor([k if corrected else 1]))
        budget += (1.0 - layers[i].column_ratio) * n * (k if corrected else 1)
    kept = torch.ops.fxprune.keep_best(scores, weights, budget, corrected)
    for i, keep in zip(pruned, kept, strict=True):
        n = tilings[i].shape[0]
        count = int(keep.sum())
        if count:
            low, high = floor_to(count, n, step), ceil_to(count, n, step)
            count = high if high - count <= count - low else low
        (best,) = keep_largest([norms[i]], [count])
        tilings[i] = Tiling(tilings[i].shape, best.nonzero().flatten(), layers[i].granularity)
    return tilings


def _plan_rows(layers: Sequence[_Layer], tilings: Sequence[Tiling], ranking: str, steps: Sequence[int]) -> list[LayerMask]:
    """Rank the rows of all tiles of all layers given together and round each tile's count to its layer's step."""
    corrected = ranking == "corrected"
    scores, weights, budget = [], [], 0.0
    for layer, tiling in zip(layers, tilings, strict=True):
        k = tiling.shape[1]
        widths = tile_widths(len(tiling.columns), tiling.granularity)
        if corrected:
            scores.append(row_scores(layer.importance, tiling, layer.name))
            weights.append(widths)
            budget += (1.0 - layer.ratio) * tiling.shape[0] * k
        else:
            scores.append(_published_row_scores(layer.importance, tiling, scale_of(layer.name, layer.importance)))
            weights.append(torch.ones_like(widths))
            budget += (1.0 - (layer.column_ratio or layer.ratio)) * max(tiling.tiles, 1) * k
        prior = layer.prior
        if prior is not None:
            density = tile_view(prior[tiling.columns], tiling.granularity).sum(1) / widths[:, None]
            scores[-1] = _settled(scores[-1], density, layer.apriori)
    rows = torch.ops.fxprune.keep_best(scores, weights, budget, corrected)
    if any(step > 1 for step in steps):
        counts = _round_rows(tilings, [kept.sum(1).tolist() for kept in rows], steps, budget if corrected else None)
        chosen = [keep_largest(list(score), count) for score, count in zip(scores, counts, strict=True)]
        rows = [torch.stack(kept) if kept else score for kept, score in zip(chosen, scores, strict=True)]
    return [
        LayerMask(tiling, expand_rows(tiling, kept), tuple(kept.sum(1).tolist()))
        for tiling, kept in zip(tilings, rows, strict=True)
    ]


def _round_rows(
    tilings: Sequence[Tiling], counts: Sequence[list[int]], steps: Sequence[int], budget: float | None
) -> list[list[int]]:
    """Round every tile's rows to its layer's step, towards ``budget`` kept elements; an empty tile stays empty."""
    lows, highs, down, up, kept = [], [], [], [], 0
    for tiling, layer_counts, step in zip(tilings, counts, steps, strict=True):
        widths = tile_widths(len(tiling.columns), tiling.granularity).tolist()
        for count, width in zip(layer_counts, widths, strict=True):
            lows.append(floor_to(count, tiling.shape[1], step) if count else 0)
            highs.append(ceil_to(count, tiling.shape[1], step) if count else 0)
            down.append((lows[-1] - count) * width)
            up.append((highs[-1] - count) * width)
            kept += count * width
    excess = 0.0 if budget is None else kept - budget
    total = sum(math.prod(tiling.shape) for tiling in tilings)
    goes_up = choose(down, up, excess, _SLACK * total)
    rounded = iter([high if taken else low for low, high, taken in zip(lows, highs, goes_up, strict=True)])
    return [[next(rounded) for _ in layer_counts] for layer_counts in counts]


def row_scores(importance: Tensor, tiling: Tiling, name: str) -> Tensor:
    """Return (tiles, K): the RMS of each row over the kept output features of its tile.

    Raises :class:`NonFiniteWeight`, of ``name``, for NaN and infinity in them.
    """
    scores = torch.ops.fxprune.tile_scores(importance, tiling.columns, tiling.granularity)
    if not math.isfinite(scores.sum()):  # which is quick to say when all is well; a sum may also overflow
        scale_of(name, importance[tiling.columns])
    return scores


def _norms(layer: _Layer) -> Tensor:
    """Return the L2 norm of each output feature, (N,)."""
    scale = scale_of(layer.name, layer.importance)
    return (layer.importance / scale).square_().sum(1).sqrt_() * scale


def _published_row_scores(importance: Tensor, tiling: Tiling, scale: float) -> Tensor:
    """Return (tiles, K): norm over the tile's whole span, pruned columns included, divided by its width."""
    squares = importance.new_zeros(tiling.tiles, tiling.shape[1])
    if not tiling.tiles:
        return squares
    last = tiling.columns[tiling.granularity - 1 :: tiling.granularity].contiguous()
    owner = torch.searchsorted(last, torch.arange(tiling.shape[0])).clamp_(max=tiling.tiles - 1)
    squares.index_add_(0, owner, (importance * (1.0 / scale)).square_())
    return squares.sqrt_().mul_(scale) / torch.bincount(owner, minlength=tiling.tiles)[:, None]


def tile_view(matrix: Tensor, granularity: int) -> Tensor:
    """View (N', K) as (tiles, granularity, K); the last tile is padded with zeros."""
    tiles = -(-len(matrix) // granularity)
    if missing := tiles * granularity - len(matrix):
        matrix = pad(matrix, (0, 0, 0, missing))
    return matrix.reshape(tiles, granularity, matrix.shape[1])


def tile_counts(mask: Tensor, tiling: Tiling) -> Tensor:
    """Return int32 (tiles, K): how many features of a tile keep each K row in a bool mask of the tiling's shape."""
    counts: Tensor = torch.ops.fxprune.tile_counts(mask.contiguous(), tiling.columns, tiling.granularity)
    return counts


def tile_widths(columns: int, granularity: int) -> Tensor:
    """Return int64 (tiles,): output features per tile."""
    widths = torch.full((-(-columns // granularity),), granularity)
    if rest := columns % granularity:
        widths[-1] = rest
    return widths


def _settled(scores: Tensor, density: Tensor, share: float) -> Tensor:
    """Make the scores of the densest ``share`` infinite and those of the emptiest negative infinite."""
    count = round(share * density.numel())
    order = density.flatten().argsort(descending=True, stable=True)
    settled = scores.flatten().clone()
    settled[order[:count]] = torch.inf
    settled[order[len(order) - count :]] = -torch.inf
    return settled.reshape(scores.shape)


def real(importance: Tensor) -> Tensor:
    importance = importance.detach()
    return importance if importance.dtype == torch.float64 else importance.float()


def ranked(importance: Tensor) -> Tensor:
    """Return element scores as the operators that rank tiles take them."""
    return importance.detach().float().cpu().contiguous()


def scale_of(name: str, importance: Tensor) -> float:
    """Return a power of two near the largest score: scores divided by it have squares that are in range."""
    if not importance.numel():
        return 1.0
    low, high = (float(v) for v in importance.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise NonFiniteWeight(name=name, count=int((~torch.isfinite(importance)).sum()))
    return 2.0 ** max(min(math.frexp(max(-low, high))[1], 120), -120)


def require_shape(tensor: Tensor, tiling: Tiling) -> None:
    """Raise :class:`TileMismatch` unless ``tensor`` is of the shape that ``tiling`` cuts."""
    if tuple(tensor.shape) != tuple(tiling.shape):
        reason = f"the tiling is of shape {tiling.shape}"
        raise mismatch(tensor.shape, tiling.granularity, reason, "Build the tiling anew.")


def require_packable(weight: Tensor, mask: Tensor, tiling: Tiling) -> None:
    """Raise :class:`TileMismatch` unless both are of the tiling's shape and the weight is of the packed format's dtype."""
    require_shape(weight, tiling)
    require_shape(mask, tiling)
    require_dtype(weight, tiling)


def require_dtype(weight: Tensor, tiling: Tiling) -> None:
    """Raise :class:`TileMismatch` unless the weight is of the packed format's dtype."""
    if weight.dtype not in FLOATS:
        reason = f"its dtype is {weight.dtype} and the packed format holds float32, bfloat16 or float16"
        raise mismatch(weight.shape, tiling.granularity, reason, "Convert it with .float().")


def mismatch(shape: Sequence[int], granularity: int, reason: str, remedy: str = "The default is 64.") -> TileMismatch:
    """Return the error for a weight that cannot be tiled as asked."""
    return TileMismatch(shape=tuple(shape), granularity=granularity, reason=reason, remedy=remedy)
