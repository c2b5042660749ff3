"""One-shot compensation: refit what is left of a weight so that the layer's output changes as little as possible.

A layer computes W x. With the Gram matrix H = X X^T of its inputs over calibration batches, the best weight W' under a
mask is a least-squares problem per output feature (Optimal Brain Surgeon, 1993; SparseGPT, ICML 2023), here solved
exactly instead of column by column: with S the kept and P the pruned inputs of a feature,

    W'[S] = W[S] + W[P] H[P,S] (H[S,S] + d I)^-1.

``d`` pulls towards the weight as it was, so the error never exceeds that of the mask alone. Where the layers before are
pruned as well, inputs are x' and targets W x, which adds (W X X'^T - W X' X'^T)[:,S] to the right-hand side.
Features with one support, such as those of a tile, share a factorisation. With a bias, H is centred and the bias takes
the shift of the mean.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from fxprune.calibration import Calibration
from fxprune.errors import CalibrationError
from fxprune.layer_inputs import Call, patches
from fxprune.match import Match
from fxprune.planner import Choice
from fxprune.weights import qualified_name

DAMPING = 1e-3  # of the mean diagonal of H
_FLOOR = 1e-9  # of the mean diagonal of X X^T: what rounding leaves of a centred H is noise
_BUDGET = 1 << 28  # bytes of float64 matrices held at a time


@dataclass(eq=False)
class Gram:
    """Second moments of a layer's inputs x, and of those x' that its weight is to be fitted to; float64.

    dense: sum of x x^T, cross: of x x'^T, matrix: of x' x'^T, all (groups, K, K). dense_total, total: sums of x and of
    x', (groups, K). rows: how many inputs. Where x' is x they are the same tensors.
    """

    dense: Tensor
    cross: Tensor
    matrix: Tensor
    dense_total: Tensor
    total: Tensor
    rows: int = 0

    @classmethod
    def zeros(cls, groups: int, size: int, device: torch.device | str = "cpu", own: bool = False) -> Gram:
        """Return an empty one; with ``own`` x' may differ from x."""
        square = torch.zeros(groups, size, size, dtype=torch.float64, device=device)
        line = torch.zeros(groups, size, dtype=torch.float64, device=device)
        if own:
            return cls(square, square.clone(), square.clone(), line, line.clone())
        return cls(square, square, square, line, line)

    def add(self, inputs: Tensor, dense: Tensor | None = None) -> None:
        """Add x' (groups, K, rows), and x beside it unless they are the same."""
        self.matrix.baddbmm_(inputs, inputs.transpose(1, 2))
        self.total += inputs.sum(2)
        self.rows += inputs.shape[2]
        if dense is not None:
            self.cross.baddbmm_(dense, inputs.transpose(1, 2))
            self.dense.baddbmm_(dense, dense.transpose(1, 2))
            self.dense_total += dense.sum(2)


@dataclass(frozen=True, eq=False)
class Refit:
    """New values of a layer: weight (N, K), bias (N,). before, after: relative output error, masked and refitted."""

    weight: Tensor
    bias: Tensor | None
    before: float
    after: float


def refit(weight: Tensor, mask: Tensor, gram: Gram, bias: Tensor | None = None, damping: float = DAMPING) -> Refit:
    """Return the weight (N, K) that reproduces ``weight``'s outputs best under ``mask``; zero where it is False.

    gram: of the inputs; N is a multiple of its groups, as in a grouped convolution. The error is
    ``||y' - y|| / ||W x||`` over all inputs; a fit that rounding makes no better than the mask alone is not taken.
    """
    groups, size, _ = gram.matrix.shape
    dense = weight.detach().double().reshape(groups, -1, size)
    keep = mask.reshape(dense.shape)
    masked = torch.where(keep, dense, 0.0)
    mean, dense_mean = (total / max(gram.rows, 1) for total in (gram.total, gram.dense_total))
    moment, cross = gram.matrix, gram.cross
    if bias is not None:
        moment = moment - gram.rows * mean[:, :, None] * mean[:, None, :]
        cross = cross - gram.rows * dense_mean[:, :, None] * mean[:, None, :]
    pull = dense @ cross - masked @ moment
    raw, spread = (m.diagonal(dim1=1, dim2=2).mean(1) for m in (gram.matrix, moment))
    strength = damping * spread.clamp_min(0) + _FLOOR * raw + torch.finfo(torch.float64).tiny
    fitted = masked.clone()
    for group, feature, support in _problems(keep):
        left = moment[group[:, None, None], support[:, :, None], support[:, None, :]]
        left.diagonal(dim1=1, dim2=2).add_(strength[group, None])
        at = (group[:, None, None], feature[:, :, None], support[:, None, :])
        fitted[at] += torch.cholesky_solve(pull[at].transpose(1, 2), torch.linalg.cholesky(left)).transpose(1, 2)
    new = fitted.reshape(weight.shape).to(weight.dtype)
    used = new.double().reshape(dense.shape)
    new_bias, shift = None, dense.new_zeros(dense.shape[:2])
    if bias is not None:
        move = (dense @ dense_mean[:, :, None] - used @ mean[:, :, None]).flatten()
        new_bias = (bias.detach().double() + move).to(bias.dtype)
        shift = (bias.detach().double() - new_bias.double()).reshape(shift.shape)
    before = _error(dense, masked, torch.zeros_like(shift), gram)
    after = _error(dense, used, shift, gram)
    if not after < before:
        return Refit(weight.detach() * mask, bias, before, before)
    return Refit(new, new_bias, before, after)


def refit_layers(
    model: nn.Module, chosen: Mapping[str, Choice], data: Calibration, sequential: bool = False
) -> dict[str, Refit]:
    """Return new values by parameter; the model is not changed.

    chosen: by parameter, graphs in the order in which they run.
    Inputs are those of the dense model. With ``sequential`` a layer sees those behind the layers refitted before, and is
    fitted to the dense model's outputs all the same, so that it makes up for errors on the way; that takes two passes
    over the data per layer. A layer that no recorded call uses is absent.
    """
    network = copy.deepcopy(model) if sequential else model
    parameters, originals = (dict(m.named_parameters(remove_duplicate=False)) for m in (network, model))
    found: dict[str, Refit] = {}
    for part in _parts(list(chosen.values()), 0 if sequential else _BUDGET):
        matches = [choice.match for choice in part]
        for name, gram in record(network, matches, data, model if sequential else None).items():
            match = chosen[name].match
            bias = _bias_name(match, parameters)
            given = None if bias is None else originals[bias]
            found[name] = refit(match.matrix(originals[name]), chosen[name].layer.mask, gram, given)
            if sequential:
                write_refit(match, found[name], parameters)
    return found


@torch.no_grad()
def write_refit(match: Match, values: Refit, parameters: Mapping[str, nn.Parameter]) -> None:
    """Copy new values into a model's parameters."""
    parameter, bias = parameters[match.parameter], _bias_name(match, parameters)
    parameter.copy_(match.restore(values.weight).reshape(parameter.shape))
    if bias is not None and values.bias is not None:
        parameters[bias].copy_(values.bias)


def record(
    network: nn.Module, matches: Sequence[Match], data: Calibration, dense: nn.Module | None = None
) -> dict[str, Gram]:
    """Return the moments of the inputs of each layer, by parameter; calls of one weight add up.

    dense: the model whose inputs are x where ``network``'s are x'. All inputs of the layers in it are held at a time.
    Raises :class:`~fxprune.errors.CalibrationError` when inputs are not finite.
    """
    layers = {m.parameter: m for m in matches}
    grams: dict[str, Gram] = {}
    held: dict[str, list[Call]] = {name: [] for name in layers}

    def hold(call: Call) -> None:
        if call.transposed == layers[call.parameter].transposed:
            held[call.parameter].append(replace(call, x=call.x.clone()))

    def add(call: Call) -> None:
        name = call.parameter
        if call.transposed != layers[name].transposed:
            return
        beside = patches(held[name].pop(0)) if dense is not None else repeat(None)
        for inputs, others in zip(patches(call), beside, strict=False):
            if name not in grams:
                grams[name] = Gram.zeros(inputs.shape[0], inputs.shape[1], inputs.device, own=dense is not None)
            grams[name].add(inputs, others)

    if dense is not None:
        data.record(dense, _weights(dense, layers), hold)
    data.record(network, _weights(network, layers), add)
    for name, gram in grams.items():
        if not torch.isfinite(gram.matrix).all() or not torch.isfinite(gram.dense).all():
            reason = f"the inputs of {layers[name].name!r} are not finite on them"
            raise CalibrationError(reason=reason, remedy="Remove the batches that overflow.")
    return grams


def _weights(network: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    parameters = dict(network.named_parameters(remove_duplicate=False))
    return {name: parameters[name] for name in names}


def _bias_name(match: Match, parameters: Mapping[str, nn.Parameter]) -> str | None:
    """Return the name of a layer's bias if only this layer reads it."""
    node = match.bias
    if node is None:
        return None
    name = qualified_name(node)
    mine = all(match.weight in user.all_input_nodes for user in node.users)
    features = (match.matrix_shape[0],)
    return name if mine and name in parameters and tuple(parameters[name].shape) == features else None


def _parts(choices: list[Choice], budget: int) -> Iterator[list[Choice]]:
    """Cut layers, in the order in which they run, where their Gram matrices would exceed ``budget`` bytes."""
    graphs: dict[Graph, dict[Node, int]] = {}
    for choice in choices:
        graph = choice.match.node.graph
        graphs.setdefault(graph, {node: len(graphs) << 32 | i for i, node in enumerate(graph.nodes)})
    choices = sorted(choices, key=lambda c: graphs[c.match.node.graph][c.match.node])
    part: list[Choice] = []
    used = 0
    for choice in choices:
        n, k = choice.match.matrix_shape
        size = 8 * k * k * (n if choice.match.kind == "depthwise" else 1)
        if part and used + size > budget:
            yield part
            part, used = [], 0
        part.append(choice)
        used += size
    if part:
        yield part


def _problems(keep: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield least-squares problems of one size: group (b,), features (b, f) that share a support, support (b, s).

    keep: bool (groups, features, K).
    """
    sharing: dict[tuple[int, bytes], list[int]] = {}
    for group, rows in enumerate(keep.cpu().numpy()):
        for feature, row in enumerate(rows):
            sharing.setdefault((group, row.tobytes()), []).append(feature)
    sizes: dict[tuple[int, int], list[tuple[int, list[int]]]] = {}
    for (group, row), features in sharing.items():
        size = sum(row)
        if size:
            sizes.setdefault((size, len(features)), []).append((group, features))
    for (size, _), problems in sizes.items():
        batch = max(1, _BUDGET // (32 * size * size))
        for start in range(0, len(problems), batch):
            piece = problems[start : start + batch]
            at = torch.tensor([g for g, _ in piece], device=keep.device)
            members = torch.tensor([f for _, f in piece], device=keep.device)
            support = keep[at, members[:, 0]].nonzero()[:, 1].reshape(len(piece), size)
            yield at, members, support


def _error(dense: Tensor, weight: Tensor, shift: Tensor, gram: Gram) -> float:
    """Return ``||dense x - weight x' + shift|| / ||dense x||``; weights (groups, n, K), shift (groups, n)."""
    scale = (dense @ gram.dense * dense).sum()
    total = scale - 2 * (dense @ gram.cross * weight).sum() + (weight @ gram.matrix * weight).sum()
    drift = (dense @ gram.dense_total[:, :, None] - weight @ gram.total[:, :, None])[:, :, 0]
    error = max((total + 2 * (shift * drift).sum() + gram.rows * shift.square().sum()).item(), 0.0)
    return (error / scale.item()) ** 0.5 if scale else (0.0 if not error else float("inf"))
