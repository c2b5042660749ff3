"""What hypothesis draws: descriptions, never tensors. Shapes around a tile, memory layouts, and small models.

A model is a list of productions over one running activation. With probability 1/2 a production is a pattern that a
pass rewrites; a near-miss (another user, a mutation, a wrong group count, ...) may be mixed into it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

seeds = st.integers(0, 2**16)
layouts = st.sampled_from(("contiguous", "channels_last", "sliced", "expanded", "offset", "transposed", "odd_ones"))


def sizes(tile: int) -> st.SearchStrategy[int]:
    """Draw sizes around ``tile``, and primes."""
    return st.sampled_from(sorted({1, 2, 3, 5, 7, 13, max(tile - 1, 1), tile, tile + 1, 2 * tile + 3}))


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Return the values of ``x`` in another memory layout (``expanded`` repeats the first of a dimension)."""
    if layout == "channels_last":
        last = (0, *range(2, x.dim()), 1)
        back = (0, x.dim() - 1, *range(1, x.dim() - 1))
        return x.permute(last).contiguous().permute(back) if x.dim() > 2 else x
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "offset":
        flat = torch.cat([x.new_full((3,), torch.nan), x.reshape(-1)])
        return flat[3:].view(x.shape)
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x
    if layout == "odd_ones":
        strides = [97 if size == 1 else step for size, step in zip(x.shape, x.contiguous().stride(), strict=True)]
        return x.contiguous().as_strided(x.shape, strides)
    return x.contiguous()


@dataclass(frozen=True)
class Step:
    """One production: ``kind`` with the numbers it needs. ``miss`` names the near-miss mixed in, "" for none."""

    kind: str
    channels: int = 8
    kernel: int = 3
    stride: int = 1
    act: str = "relu"
    miss: str = ""


@dataclass(frozen=True)
class Recipe:
    """A model as data: its printed form rebuilds it."""

    steps: tuple[Step, ...]
    channels: int
    size: int
    batch: int
    seed: int


PATTERNS = ("dw", "pw", "dwsep", "inverted", "gated", "channels_last", "channels_last", "linear")
OTHERS = ("conv", "grouped", "multiplier", "bn", "act", "scale", "cat", "view", "shared", "tap", "pool")
MISSES = ("extra_user", "mutation", "act_between", "permute_user", "double_use", "no_bias", "same_padding")
ACTIVATIONS = ("relu", "relu_", "relu6", "hardtanh", "none", "hardtanh_")


@st.composite
def recipes(draw: st.DrawFn, most: int = 4) -> Recipe:
    steps = []
    for _ in range(draw(st.integers(1, most))):
        kind = draw(st.sampled_from(PATTERNS if draw(st.booleans()) else OTHERS))
        steps.append(
            Step(
                kind,
                draw(st.sampled_from((4, 8, 9, 17))),
                draw(st.sampled_from((3, 5))),
                draw(st.sampled_from((1, 1, 2))),
                draw(st.sampled_from(ACTIVATIONS)),
                draw(st.sampled_from(MISSES)) if draw(st.booleans()) else "",
            )
        )
    size, batch = draw(st.sampled_from((5, 8))), draw(st.sampled_from((1, 2, 3)))
    return Recipe(tuple(steps), draw(st.sampled_from((3, 8, 12))), size, batch, draw(seeds))


def activate(x: Tensor, name: str) -> Tensor:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "relu": F.relu,
        "relu_": lambda v: F.relu(v, inplace=True),
        "relu6": F.relu6,
        "hardtanh": lambda v: F.hardtanh(v, -8.0, 8.0),
        "hardtanh_": lambda v: F.hardtanh(v, -6.0, 7.0, inplace=True),
        "none": lambda v: v,
    }
    return functions[name](x)


class Built(nn.Module):
    """The module of a recipe; its forward walks the steps, so Dynamo sees straight-line code."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.parts = nn.ModuleList()
        channels = recipe.channels
        for step in recipe.steps:
            part, channels = _part(step, channels)
            self.parts.append(part)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        extras: list[Tensor] = []
        for step, part in zip(self.recipe.steps, self.parts, strict=True):
            x = _apply(step, part, x, extras)
            x = F.hardtanh(x, -16.0, 16.0)  # keeps integers small
        return (x, *extras)


def _dw(channels: int, step: Step) -> nn.Conv2d:
    padding: int | str = "same" if step.miss == "same_padding" and step.stride == 1 else step.kernel // 2
    return nn.Conv2d(channels, channels, step.kernel, step.stride, padding, groups=channels, bias=step.miss != "no_bias")


def _part(step: Step, c: int) -> tuple[nn.Module, int]:
    """Return the layers of a step and the channels after it."""
    n, norm = step.channels, nn.BatchNorm2d
    if step.kind in ("dw", "shared"):
        return nn.ModuleList([_dw(c, step)]), c
    if step.kind == "pw":
        return nn.ModuleList([nn.Conv2d(c, n, 1, step.stride, bias=step.miss != "no_bias")]), n
    if step.kind == "dwsep":
        return nn.ModuleList([_dw(c, step), norm(c), nn.Conv2d(c, n, 1), norm(n)]), n
    if step.kind in ("inverted", "gated"):
        layers = [nn.Conv2d(c, 2 * n, 1, bias=False), norm(2 * n), _dw(2 * n, step), norm(2 * n), nn.Conv2d(2 * n, c, 1)]
        squeeze = [nn.Conv2d(2 * n, n, 1), nn.Conv2d(n, 2 * n, 1)] if step.kind == "gated" else []
        return nn.ModuleList([*layers, *squeeze]), c
    if step.kind == "channels_last":
        return nn.ModuleList([_dw(c, step), nn.Linear(c, 2 * n), nn.Linear(2 * n, c)]), c
    if step.kind == "linear":
        return nn.ModuleList([nn.Linear(c, n), nn.Linear(n, c, bias=False)]), c
    if step.kind == "conv":
        return nn.ModuleList([nn.Conv2d(c, n, 3, padding=1)]), n
    if step.kind == "grouped":
        groups = 2 if c % 2 == 0 and c > 2 else 1
        return nn.ModuleList([nn.Conv2d(c, c, 3, padding=1, groups=groups)]), c
    if step.kind == "multiplier":
        return nn.ModuleList([nn.Conv2d(c, 2 * c, 3, padding=1, groups=c), nn.Conv2d(2 * c, n, 1)]), n
    if step.kind == "bn":
        return nn.ModuleList([norm(c)]), c
    return nn.ModuleList(), 2 * c if step.kind == "cat" else c


def _apply(step: Step, part: nn.ModuleList, x: Tensor, extras: list[Tensor]) -> Tensor:
    """Run one step; a near-miss appends to ``extras`` or disturbs the value between two layers."""
    act = step.act
    if step.kind in ("dw", "pw", "conv", "grouped"):
        return activate(_miss(step, part[0](x), extras), act)
    if step.kind == "shared":
        y = part[0](x)
        return part[0](activate(y, act)) if step.stride == 1 else y
    if step.kind == "dwsep":
        y = _miss(step, part[1](part[0](x)), extras)
        return activate(part[3](part[2](activate(y, act))), "relu6" if act == "none" else act)
    if step.kind in ("inverted", "gated"):
        y = activate(part[1](part[0](x)), act)
        y = activate(_miss(step, part[3](part[2](y)), extras), act)
        if step.kind == "gated":
            gate = part[6](F.relu(part[5](y.amax((2, 3), keepdim=True))))
            y = y * F.relu6(gate)
        y = part[4](y)
        y = F.relu(y) if step.miss == "act_between" else y
        return activate(y + x, act) if y.shape == x.shape else y
    if step.kind == "channels_last":
        skip = x
        y = _miss(step, part[0](x), extras).permute(0, 2, 3, 1)
        if step.miss == "permute_user":
            extras.append(y + 1)
        y = part[2](activate(part[1](y), act)).permute(0, 3, 1, 2)
        return y + skip if y.shape == skip.shape else y
    if step.kind == "linear":
        rows = x.flatten(2).transpose(1, 2)
        return (part[1](activate(_miss(step, part[0](rows), extras), act))).transpose(1, 2).reshape(x.shape)
    if step.kind == "multiplier":
        return part[1](activate(part[0](x), act))
    return _plain(step, part, x, extras)


def _plain(step: Step, part: nn.ModuleList, x: Tensor, extras: list[Tensor]) -> Tensor:
    if step.kind == "bn":
        return activate(part[0](x), step.act)
    if step.kind == "act":
        return activate(x + 1, step.act)
    if step.kind == "scale":
        y = x + 1
        y *= 2
        return y
    if step.kind == "cat":
        return torch.cat([x, x - 1], 1)
    if step.kind == "view":
        return x.flatten(2).unflatten(2, x.shape[2:])
    if step.kind == "tap":
        extras.append(x)
        return x + 1
    return F.max_pool2d(x, 2) if x.shape[-1] > 2 else x


def _miss(step: Step, y: Tensor, extras: list[Tensor]) -> Tensor:
    if step.miss == "extra_user":
        extras.append(y - 1)
    elif step.miss == "mutation":
        y = y.clone()
        extras.append(y[:, :1] + 0)
        y.add_(1)
    elif step.miss == "double_use":
        return y + y
    return y
