"""Cut channels out of the graph that cannot reach its result.

    conv2d(relu(conv2d(x, w1 (N, K), b1)), w2 (M, N))  =>  conv2d(relu(conv2d(x, w1[kept], b1[kept])), w2[:, kept])

A channel may go when each layer that reads its space has only zeros in that column, or reads a value that is zero
there: a filter without weights and bias, followed by functions with f(0) = 0. A filter without weights whose bias is
not zero is a constant, and stays unless nobody reads it. Inference only, and only spaces that nothing else can see
(``fxprune/coupling.py``). The cut tensors are derived from the live ones; when a removed channel comes back to life the
graph is built again.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.nn.functional import pad

from ..context import Context, Shrunk
from ..coupling import Constant, Coupling, Gemm, Space
from ..errors import VerificationError
from ..graph import argument, example, fake
from ..sparsity.pattern import Tiling, any_along, obeys
from ..sparsity.tile_plan import tile_counts
from ..weights import Build, Fits, qualified_name

_CHANNEL = 16  # what a channel costs beside its weights, in weights: loads, stores, depthwise taps
_STEP = 8  # channels the dense and sparse kernels handle at once: a few dead ones stay to fill it


def shrink(gm: GraphModule, ctx: Context) -> int:
    """Return the number of spaces that lost channels."""
    if not ctx.inference or "dense_reason" in ctx.extra or torch.is_autocast_enabled("cpu"):
        return 0  # autocast would change the types that are computed anew
    coupling = Coupling(gm.graph, ctx.weights)
    spaces = [s for s in coupling.spaces if s.producers and s.consumers and not s.reason]
    if not spaces:
        return 0
    liveness = _Liveness(coupling, spaces)
    kept = liveness.kept()
    if not kept:
        return 0
    touched = {node for space in kept for node in space.values}
    gemms = {g.node: g for space in kept for g in (*space.producers, *space.consumers)}
    for gemm in gemms.values():
        _cut_gemm(gemm, liveness.facts(gemm), coupling, kept, ctx)
    for space, channels in kept.items():
        for constant in space.constants:
            _cut_constant(constant, channels, ctx)
        for node in space.depthwise:
            _set_groups(node, len(channels))
    for node in gm.graph.nodes:
        if node in touched or node in gemms:
            _propagate(node, node in touched)
    for space, channels in kept.items():
        names = [qualified_name(ctx.weights.origin(g.weight)).rpartition(".")[0] for g in space.producers]
        ctx.shrunk.append(Shrunk(tuple(names), space.size, len(channels)))
    return len(kept)


class _Liveness:
    """Which channels of each space can reach the result; a fixpoint, because a dead filter reads nothing either."""

    def __init__(self, coupling: Coupling, spaces: list[Space]) -> None:
        self._coupling = coupling
        self._spaces = spaces
        self._alive = {space: torch.ones(space.size, dtype=torch.bool) for space in spaces}
        gemms = [g for s in spaces for g in (*s.producers, *s.consumers)]
        self._support = {g.node: _support(g, coupling) for g in gemms}

    def kept(self) -> dict[Space, Tensor]:
        """Return the channels (int64) that stay, for each space that loses some."""
        changed = True
        while changed:
            changed = False
            for space in self._spaces:
                alive = self._alive[space] & self._needed(space)
                changed |= not torch.equal(alive, self._alive[space])
                self._alive[space] = alive
        result = {}
        for space in self._spaces:
            choices = [_rounded(self._alive[space]), _aligned(self._alive[space])]
            stay = min(choices, key=lambda channels: self._work(space, channels))
            if len(stay) < space.size:
                result[space] = stay
        return result

    def _work(self, space: Space, channels: Tensor) -> int:
        """Return the weights that tiles of consecutive output features cover in all layers of a space cut to ``channels``.

        A channel that leaves from the middle of a tile moves all later ones into tiles whose rows they do not share.
        """
        covered = [_covered(self._live(gemm), channels) for gemm in space.producers]
        for gemm in space.consumers:
            live = self._live(gemm)
            whole = _covered(live, torch.arange(len(live)))
            covered.append(whole.reshape(len(whole), space.size, -1)[:, channels])
        return _CHANNEL * len(channels) + _STEP * sum(int(torch.count_nonzero(tiles)) for tiles in covered)

    def _needed(self, space: Space) -> Tensor:
        zero = self._zeros(space)
        needed = torch.zeros(space.size, dtype=torch.bool)
        for gemm in space.consumers:
            source = self._coupling.operand(gemm.node)
            needed |= any_along(self._live(gemm), 0).reshape(space.size, -1).any(1) & ~zero[source]
        return needed

    def _live(self, gemm: Gemm) -> Tensor:
        """Return the support of a weight, bool (N, K), without what is dead already."""
        support = self._support[gemm.node]
        source = self._coupling.space(self._coupling.operand(gemm.node))
        for space, axis in ((self._coupling.space(gemm.node), 0), (source, 1)):
            if space in self._alive and not self._alive[space].all():
                repeated = self._alive[space].repeat_interleave(support.shape[axis] // space.size)
                support = support & (repeated[:, None] if axis == 0 else repeated)
        return support

    def facts(self, gemm: Gemm) -> tuple[Tensor, Tensor]:
        """Return which rows and columns of a weight count as empty: a removal may rest on that."""
        support = self._support[gemm.node]
        rows, columns = support, support
        source = self._coupling.space(self._coupling.operand(gemm.node))
        if source in self._alive:
            rows = support & self._alive[source].repeat_interleave(support.shape[1] // source.size)
        target = self._coupling.space(gemm.node)
        if target in self._alive:
            columns = support & self._alive[target][:, None]
        return ~any_along(rows, 1), ~any_along(columns, 0)

    def _zeros(self, space: Space) -> dict[Node, Tensor]:
        """Return the channels in which each value is exactly zero."""
        zero: dict[Node, Tensor] = {}
        producers = {g.node: g for g in space.producers}
        for node, rule in sorted(space.values.items(), key=lambda item: self._coupling.order[item[0]]):
            inputs = [zero[n] for n in node.all_input_nodes if n in zero]
            tensors = [_flat_zero(c, self._coupling) for c in space.constants if c.user is node]
            if rule == "produce":
                gemm = producers[node]
                zero[node] = ~any_along(self._live(gemm), 1) & _empty(gemm.bias, self._coupling, space.size)
            elif rule == "depthwise":
                bias = _empty(argument(node, "bias"), self._coupling, space.size)
                zero[node] = (inputs[0] | tensors[0]) & bias
            elif rule == "norm":
                zero[node] = self._norm(node, inputs[0], space.size)
            elif rule == "add":
                zero[node] = torch.stack([*inputs, *tensors]).all(0)
            elif rule == "mul":
                zero[node] = torch.stack([*inputs, *tensors]).any(0)
            else:
                zero[node] = inputs[0] if rule == "keep" else torch.zeros_like(inputs[0])
        return zero

    def _norm(self, node: Node, x: Tensor, size: int) -> Tensor:
        """gamma * (x - mean) / std + beta is zero when both terms are."""
        shift, mean = (_empty(argument(node, name), self._coupling, size) for name in ("bias", "running_mean"))
        result = x & mean
        if argument(node, "weight") is not None:
            result = result | _empty(argument(node, "weight"), self._coupling, size)
        return result & shift


def _support(gemm: Gemm, coupling: Coupling) -> Tensor:
    """Return bool (N, K): some element of the weight is not zero (-0.0 is zero, NaN is not)."""
    weight = coupling.constant(gemm.weight)
    assert weight is not None
    support = weight.detach() != 0
    support = support.t() if gemm.rows == 1 else support
    return support.flatten(2).any(2) if support.dim() > 2 else support


def _empty(node: object, coupling: Coupling, size: int) -> Tensor:
    """Return where an optional vector is zero."""
    value = coupling.constant(node)
    return torch.ones(size, dtype=torch.bool) if value is None else value.detach() == 0


def _flat_zero(constant: Constant, coupling: Coupling) -> Tensor:
    value = coupling.constant(constant.tensor)
    assert value is not None
    zero = (value.detach() == 0).movedim(constant.axis, 0)
    return zero.flatten(1).all(1) if zero.dim() > 1 else zero


def _rounded(alive: Tensor) -> Tensor:
    """Return the channels that stay: the live ones, and dead ones up to the next multiple of the step."""
    live = int(alive.sum())
    count = min(-(-max(live, 1) // _STEP) * _STEP, len(alive))
    spare = (~alive).nonzero().flatten()[: count - live]
    return torch.cat([alive.nonzero().flatten(), spare]).sort().values


def _aligned(alive: Tensor) -> Tensor:
    """Return the channels that stay when they leave in whole runs of the step, counted from the first."""
    runs = pad(alive, (0, -len(alive) % _STEP)).reshape(-1, _STEP).any(1)
    runs[0] |= not runs.any()
    return runs.repeat_interleave(_STEP)[: len(alive)].nonzero().flatten()


def _covered(support: Tensor, features: Tensor) -> Tensor:
    """Return which K rows of tiles of the step's features hold anything, bool (tiles, K); support: bool (N, K)."""
    return tile_counts(support, Tiling((support.shape[0], support.shape[1]), features, _STEP)) > 0


def _cut_gemm(gemm: Gemm, empty: tuple[Tensor, Tensor], coupling: Coupling, kept: dict[Space, Tensor], ctx: Context) -> None:
    value = ctx.weights.value(gemm.weight)
    assert value is not None
    source = coupling.space(coupling.operand(gemm.node))
    rows = kept.get(coupling.space(gemm.node))  # type: ignore[arg-type]
    columns = kept.get(source)  # type: ignore[arg-type]
    if columns is not None and source is not None:
        inner = value.shape[gemm.columns] // source.size
        columns = (columns[:, None] * inner + torch.arange(inner)).flatten()
    cuts = [(axis, index) for axis, index in ((gemm.rows, rows), (gemm.columns, columns)) if index is not None]
    claimed = [_along(empty[0], gemm.rows, value.dim()), _along(empty[1], gemm.columns, value.dim())]
    (weight,) = ctx.weights.derive([f"{gemm.node.name}_kept"], [gemm.weight], *_select(value, cuts, claimed))
    ctx.kept[weight] = tuple(cuts)
    gemm.node.replace_input_with(gemm.weight, weight)
    if gemm.bias is not None and rows is not None:
        _cut_constant(Constant(gemm.node, gemm.bias, 0), rows, ctx)


def _cut_constant(constant: Constant, channels: Tensor, ctx: Context) -> None:
    value = ctx.weights.value(constant.tensor)
    assert value is not None
    cuts = [(constant.axis, channels)]
    name = f"{constant.user.name}_{constant.tensor.name}_kept"
    (cut,) = ctx.weights.derive([name], [constant.tensor], *_select(value, cuts, [torch.tensor(True)]))
    if value.dim() > 1:
        ctx.kept[cut] = tuple(cuts)
    if (exact := ctx.float_bias.get(constant.tensor)) is not None:
        wide = ctx.weights.value(exact)
        assert wide is not None
        (ctx.float_bias[cut],) = ctx.weights.derive([f"{name}_float"], [exact], *_select(wide, cuts, [torch.tensor(True)]))
    constant.user.replace_input_with(constant.tensor, cut)


def _set_groups(node: Node, channels: int) -> None:
    if "groups" in node.kwargs:
        node.update_kwarg("groups", channels)
    else:
        node.update_arg(6, channels)


def _along(vector: Tensor, axis: int, rank: int) -> Tensor:
    """View a vector so that it broadcasts along one axis."""
    return vector.reshape([-1 if d == axis else 1 for d in range(rank)])


def _select(value: Tensor, cuts: list[tuple[int, Tensor]], claimed: list[Tensor]) -> tuple[Build, Fits]:
    """Return what selects the kept, and whether each claimed zero that was removed from ``value`` still is one.

    claimed: bool along one axis each; an element counts with any of them.
    """
    shape = value.shape

    def free() -> Tensor:
        """Return what stays or is not claimed: made anew each time, for it takes a quarter of the weight's memory."""
        stays = torch.tensor(True)
        for axis, index in cuts:
            chosen = torch.zeros(shape[axis], dtype=torch.bool)
            chosen[index] = True
            stays = stays & _along(chosen, axis, len(shape))
        return (stays | ~reduce(torch.logical_or, claimed)).expand(shape)

    others = None if obeys(value, free()) else value.detach() != 0  # what is claimed and yet not zero

    def build(tensor: Tensor) -> tuple[Tensor]:
        for axis, index in cuts:
            tensor = tensor.index_select(axis, index)
        return (tensor,)

    def fits(tensor: Tensor) -> bool:
        return obeys(tensor, free() if others is None else free() | others)

    return build, fits


def _propagate(node: Node, narrower: bool) -> None:
    """Compute the fake value of a node anew; what leaves a space has the shape it had."""
    before = fake(node)
    mode = getattr(before, "fake_mode", None)
    if before is None or mode is None:
        return
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), example)
    with mode, torch.no_grad():
        if node.op == "call_method":
            after = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            after = node.target(*args, **kwargs)  # type: ignore[operator]
    given, expected = (f"{value.dtype} {tuple(value.shape)}" for value in (after, before))
    if not narrower and given != expected:
        raise VerificationError(stage="shrink", what=str(node), given=given, expected=expected)
    node.meta["example_value"] = after
