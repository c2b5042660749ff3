"""Element-wise masks of a GEMM weight, and the one form they all run as: tiles of a single output feature.

A tile of granularity 1 is a row of a sparse matrix (CSR): its own list of kept K indices and one value for each. So any
mask runs on ``fxprune::tile_gemm``; patterns differ in which elements they keep, not in how they are multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fxprune.errors import NonFiniteWeight
from fxprune.sparsity.pattern import LayerMask, Tiling


def elements(mask: Tensor, note: str = "") -> LayerMask:
    """Return the granularity-1 form of a bool mask (N, K); output features without an element are left out."""
    kept = torch.count_nonzero(mask, 1)
    columns = kept.nonzero().flatten()
    counts = tuple(kept[columns].tolist())
    return LayerMask(Tiling((mask.shape[0], mask.shape[1]), columns, 1), mask, counts, note)


def keep_elements(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return a bool tensor per layer: the ``count`` largest scores of all layers, ties to the earlier and lower index."""
    flat = torch.cat([s.detach().flatten() for s in scores]) if scores else torch.zeros(0)
    count = min(max(count, 0), len(flat))
    kept = torch.zeros(len(flat), dtype=torch.bool)
    if count:
        least = flat.kthvalue(len(flat) - count + 1).values
        kept = flat > least
        ties = (flat == least).nonzero().flatten()
        kept[ties[: count - int(kept.sum())]] = True
    parts = kept.split([s.numel() for s in scores])
    return [part.reshape(s.shape) for part, s in zip(parts, scores, strict=True)]


def keep_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """Return bool (..., K): the ``n`` largest of each ``m`` consecutive scores, ties to the lower index.

    A tail group of r keeps ``ceil(n * r / m)``.
    """
    k = scores.shape[-1]
    padded = torch.nn.functional.pad(scores, (0, -k % m), value=-torch.inf).unflatten(-1, (-1, m))
    quota = torch.full((padded.shape[-2],), n)
    if k % m:
        quota[-1] = -(-n * (k % m) // m)
    order = padded.argsort(dim=-1, descending=True, stable=True)
    kept = torch.zeros_like(padded, dtype=torch.bool)
    kept.scatter_(-1, order, (torch.arange(m) < quota[:, None]).expand_as(order))
    return kept.flatten(-2)[..., :k]


def budgets(importances: Mapping[str, Tensor], sparsity: Mapping[str, float], scope: str) -> list[tuple[list[str], int]]:
    """Return (layers ranked together, elements they keep): ``n - round(sparsity * n)``, summed for scope "global"."""
    for name, importance in importances.items():
        if not torch.isfinite(importance).all():
            raise NonFiniteWeight(name=name, count=int((~torch.isfinite(importance)).sum()))
    kept = {name: v.numel() - round(sparsity[name] * v.numel()) for name, v in importances.items()}
    if scope == "global" and kept:
        return [(list(kept), sum(kept.values()))]
    return [([name], count) for name, count in kept.items()]
