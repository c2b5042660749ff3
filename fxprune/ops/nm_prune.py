"""``fxprune::nm_prune``: of every m consecutive channels of a gradient, n stay.

The pruning functions of SDGP (structured data gradient pruning, arXiv 2202.00774, Sec. III-B), and an unbiased one:

    random                    n of m, uniformly
    magnitude                 the n largest |g|, ties to the lower index
    rescaled_magnitude        then each (sample, channel) is scaled to the L1 norm it had
    group_rescaled_magnitude  then each group is scaled to the L1 norm it had
    mvue                      g / p with probability p = min(1, c |g|), sum p = n: of the unbiased ones with exactly n
                              kept, the one of least variance

``dim=1``: grad (B, C, *positions); ``dim=-1``: grad (B, *positions, C), a matrix being one sample of B positions. Groups
start anew in each of ``groups`` runs of channels; a last group of r < m channels keeps ceil(n r / m). A NaN or Inf
stays one: as the largest of its group. The result has the memory format of ``grad``, or is contiguous.

Random numbers are hashes of (key, layer, position, channel), so they depend neither on the memory format nor on
threads. key: int64 counters, such as (seed, step, call).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxprune.ops.operator import Args, Operator

FUNCTIONS = ("random", "magnitude", "rescaled_magnitude", "group_rescaled_magnitude", "mvue")
MOST = 32  # the largest m
_WORD = 0xFFFFFFFF
_ONE = 1 << 24  # mvue's probabilities are multiples of 1 / _ONE
_MARGIN = 256
_INFINITE = 0x7F800000


def reference(grad: Tensor, key: Tensor | None, n: int, m: int, dim: int, groups: int, function: str, layer: int) -> Tensor:
    """Prune group by group; the arithmetic is the kernel's, in grad's precision or float32 if that is more."""
    x = _canonical(grad, dim)  # (B, C, S)
    wide = x.double() if x.dtype == torch.float64 else x.float()
    out = torch.zeros_like(wide)
    span = x.shape[1] // groups
    for begin in (g * span + c for g in range(groups) for c in range(0, span, m)):
        size = min(m, span - begin % span)
        part = wide[:, begin : begin + size]
        out[:, begin : begin + size] = _group(part, -(-n * size // m), function, key, layer, begin)
    if function == "rescaled_magnitude":
        out = out * _ratio(wide.abs().sum(2, keepdim=True), out.abs().sum(2, keepdim=True))
    result = torch.empty_strided(grad.shape, strides(grad, dim), dtype=grad.dtype, device=grad.device)
    _canonical(result, dim).copy_(out)
    return result


def fake(grad: Tensor, key: Tensor | None, n: int, m: int, dim: int, groups: int, function: str, layer: int) -> Tensor:
    return grad.new_empty_strided(grad.shape, strides(grad, dim))


def strides(grad: Tensor, dim: int) -> tuple[Any, ...]:
    """Return the strides of the result: those of ``grad`` when channels are last in its memory, else contiguous ones."""
    if grad.is_contiguous() or dim != 1 or grad.dim() < 3:
        return torch.empty(grad.shape, device="meta").stride()
    last = grad.movedim(1, -1)
    if last.is_contiguous():
        return grad.stride()
    return torch.empty(grad.shape, device="meta").stride()


def setup_context(ctx: Any, inputs: Args, output: Tensor) -> None:
    pass


def backward(ctx: Any, grad: Tensor) -> Args:
    raise RuntimeError(
        "fxprune::nm_prune has no gradient: it approximates one. Compile without grad_sparsity for double backward."
    )


def _canonical(x: Tensor, dim: int) -> Tensor:
    """View as (B, C, S); one sample when channels are last and there are fewer than three dimensions."""
    if dim == 1:
        return x.view(*x.shape[:2], 1) if x.dim() == 2 else x.movedim(1, -1).flatten(1, -2).movedim(-1, 1)
    rows = x.reshape(1 if x.dim() < 3 else x.shape[0], -1, x.shape[-1])
    return rows.transpose(1, 2)


def _group(x: Tensor, n: int, function: str, key: Tensor | None, layer: int, channel: int) -> Tensor:
    """x: (B, r, S) -> pruned, with n of r kept."""
    bits = x.float().abs().view(torch.int32)
    special = bits >= _INFINITE
    rank = bits
    if function == "random":
        drawn = torch.stack([_draw(x, key, layer, channel + i) >> 1 for i in range(x.shape[1])], 1).int()
        rank = torch.where(special, 0x7FFFFFFF, drawn)
    order = rank.sort(dim=1, descending=True, stable=True).indices
    keep = torch.zeros_like(bits, dtype=torch.bool).scatter_(1, order[:, :n], True)
    kept = torch.where(keep, x, 0)
    if function == "group_rescaled_magnitude":
        return kept * _ratio(_sum(x.abs()), _sum(kept.abs()))
    if function == "mvue":
        plain = special.any(1, keepdim=True) | ~torch.isfinite(_sum(x.abs().float()))
        return torch.where(plain, kept, _mvue(x, n, _draw(x, key, layer, channel)))
    return kept


def _mvue(x: Tensor, n: int, random: Tensor) -> Tensor:
    """x: (B, r, S), random: int64 (B, S) -> an unbiased estimate of x with at most n non-zeros per group."""
    size = x.abs()
    certain = torch.zeros_like(size, dtype=torch.bool)
    for _ in range(n + 1):
        total = _sum(size.masked_fill(certain, 0))
        left = (n - certain.sum(1, keepdim=True)).to(x.dtype)
        certain = certain | ((size > 0) & (size * left >= total))
    total = _sum(size.masked_fill(certain, 0))
    left = (n - certain.sum(1, keepdim=True)).to(x.dtype)
    chance = torch.where(~certain & (total > 0), size * left / total, 0)
    part = (chance * _ONE).to(torch.int64)
    start = (random >> 8).clamp(_MARGIN, _ONE - 1 - _MARGIN).unsqueeze(1)
    points = (part.cumsum(1) - start + _ONE - 1) >> 24
    hit = points.diff(dim=1, prepend=torch.zeros_like(points[:, :1])) > 0
    return torch.where(certain, x, torch.where(hit, x * (_ONE / part.to(x.dtype)), 0))


def _sum(x: Tensor) -> Tensor:
    """Add the values of a group in order, as the kernel does."""
    total = torch.zeros_like(x[:, :1])
    for i in range(x.shape[1]):
        total = total + x[:, i : i + 1]
    return total


def _ratio(before: Tensor, after: Tensor) -> Tensor:
    ratio = before / after
    return torch.where(torch.isfinite(ratio) & (after > 0), ratio, 1)


def _draw(x: Tensor, key: Tensor | None, layer: int, channel: int) -> Tensor:
    """Return int64 (B, S): 32 random bits for one channel at every position."""
    samples, _, positions = x.shape
    if key is None:
        raise RuntimeError("key must be given for functions 'random' and 'mvue'")
    low_key, high_key = _key_words(key, layer)
    at = torch.arange(samples * positions, device=x.device).reshape(samples, positions)
    place = _mix(((at & _WORD) ^ low_key) + (at >> 32) * 0x9E3779B1)
    return _mix((place ^ high_key) + channel * 0x85EBCA77)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of MurmurHash3 (Appleby) on the low 32 bits."""
    x = x & _WORD
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _WORD
    return x ^ (x >> 16)


def _key_words(key: Tensor, layer: int) -> tuple[int, int]:
    """Mix counters and layer by SplitMix64 (Steele, Lea, Flood 2014)."""
    most, state = (1 << 64) - 1, 0
    for value in [*key.tolist(), layer]:
        state = ((state ^ (value & most)) + 0x9E3779B97F4A7C15) & most
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & most
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & most
        state ^= state >> 31
    return state & _WORD, state >> 32


def _sample(
    shape: tuple[int, ...], n: int, m: int, function: str, dim: int = 1, groups: int = 1, last: bool = False
) -> Args:
    gen = torch.Generator().manual_seed(sum(shape) * 31 + n * 7 + m)
    grad = torch.randn(*shape, generator=gen)
    if last:
        grad = grad.contiguous(memory_format=torch.channels_last)
    return grad, torch.tensor([3, n, m]), n, m, dim, groups, function, len(shape)


def samples() -> Iterator[Args]:
    yield _sample((2, 8, 5, 7), 2, 4, "magnitude")
    yield _sample((1, 22, 4, 5), 4, 8, "random", last=True)
    yield _sample((3, 12, 9), 2, 4, "rescaled_magnitude", groups=2)
    yield _sample((2, 18, 5, 4), 1, 3, "rescaled_magnitude", last=True)
    yield _sample((2, 5, 16), 2, 4, "mvue", dim=-1)
    yield _sample((19, 40), 4, 32, "mvue", dim=-1)
    yield _sample((21, 30), 2, 8, "group_rescaled_magnitude", dim=-1)
    yield _sample((2, 6, 2, 3, 2), 3, 3, "magnitude", groups=3)


def bad_samples() -> Iterator[tuple[Args, str]]:
    good = _sample((2, 8, 5, 7), 2, 4, "magnitude")

    def broken(position: int, value: Any) -> Args:
        return tuple(value if i == position else a for i, a in enumerate(good))

    yield broken(0, good[0].double()), r"grad must be float32"
    yield broken(0, torch.complex(good[0], good[0])), r"grad must be float32"
    yield broken(0, good[0][0, :, 0, 0]), r"grad must have two dimensions"
    yield broken(1, torch.zeros(2)), r"key must be int64"
    yield broken(1, torch.zeros(2, 2, dtype=torch.int64)), r"key must have one dimension"
    yield broken(2, 5), r"n must lie in \[1, m = 4\], got 5"
    yield broken(2, 0), r"n must lie in"
    yield broken(3, 33), r"m must lie in \[1, 32\], got 33"
    yield broken(3, -4), r"m must lie in"
    yield broken(4, 0), r"dim must be 1 or -1"
    yield broken(5, 3), r"groups must divide the 8 channels"
    yield broken(6, "largest"), r"unknown function 'largest'; legal: random, magnitude"
    yield (good[0], None, 2, 4, 1, 1, "random", 0), r"key must be given for function 'random'"


OPERATOR = Operator("nm_prune", reference, fake, setup_context, backward, samples, bad_samples)
