"""How important each weight is: what a pattern ranks its units by.

``magnitude`` (``l1``) |w|, ``l2`` w^2, ``random`` uniform; with calibration data ``taylor`` sum of (g*w)^2 over batches
(Molchanov et al., CVPR 2019; tile-wise sparsity, SC'20) and ``wanda`` |w| * ||x_k|| (Sun et al., ICLR 2024).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fxprune.config import Config
from fxprune.errors import CalibrationError, ConfigError, MissingCalibration
from fxprune.layer_inputs import Call, channel_squares
from fxprune.match import Match

if TYPE_CHECKING:  # calibration runs models, which the passes that plan masks do not
    from fxprune.calibration import Calibration

NEEDS_DATA = ("taylor", "wanda")


@dataclass(frozen=True, eq=False)
class Measured:
    """Element scores from calibration data, by parameter; :func:`calibrate` puts them in place of their name.

    checked: they have been looked at for NaN.
    """

    scores: Mapping[str, Tensor]
    checked: bool = False

    def __call__(self, parameter: str, weight: Tensor) -> Tensor:
        return self.scores[parameter]


def element_scores(match: Match, config: Config) -> Tensor:
    """Return a score per weight, of the weight's shape; larger is more important.

    Raises :class:`~fxprune.errors.MissingCalibration`, and :class:`~fxprune.errors.ConfigError` for a callable's
    result of another shape or with NaN.
    """
    weight, importance = match.value.detach(), config.importance
    if callable(importance):
        scores = importance(match.parameter if isinstance(importance, Measured) else match.name, weight)
        if not isinstance(scores, Tensor) or scores.shape != weight.shape:
            given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ConfigError(name="importance", given=given, expected=f"a tensor of shape {tuple(weight.shape)}")
        if getattr(importance, "checked", False):
            return scores
        if math.isnan(scores.sum()) and scores.isnan().any():  # a sum is quick, and NaN as well where infinities meet
            raise ConfigError(name="importance", given=f"NaN for {match.name!r}", expected="scores that can be ranked")
        return scores
    if importance in NEEDS_DATA:
        raise MissingCalibration(option=f"importance={importance!r}")
    if importance == "random":
        seed = zlib.crc32(f"{config.seed}/{match.parameter}".encode())  # of the layer, not of the order of layers
        return torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)).to(weight.device)
    return weight.square() if importance == "l2" else weight.abs()


def calibrate(config: Config, model: nn.Module, matches: Sequence[Match], data: Calibration | None) -> Config:
    """Return ``config`` with scores measured on ``data`` if its importance needs them, else as it is."""
    if config.importance not in NEEDS_DATA:
        return config
    if data is None:
        raise MissingCalibration(option=f"importance={config.importance!r}")
    measure = taylor if config.importance == "taylor" else wanda
    return replace(config, importance=Measured(measure(model, matches, data)))


def taylor(model: nn.Module, matches: Sequence[Match], data: Calibration) -> dict[str, Tensor]:
    """Return by parameter the sum over batches of (dL/dw * w)^2, of the weight's shape."""
    parameters = {m.parameter: m.value for m in matches}
    scores = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    reached: set[str] = set()

    def add(output: object, targets: object) -> None:
        gradients = torch.autograd.grad(data.loss(output, targets), list(parameters.values()), allow_unused=True)
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            if gradient is not None:
                reached.add(name)
                scores[name] += (gradient * parameter.detach()).float().square_()

    flags = [(p, p.requires_grad) for p in parameters.values()]
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        data.run(model, add, gradients=True)
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    _all_reached("taylor", parameters, reached, "the loss does not depend on")
    return scores


def wanda(model: nn.Module, matches: Sequence[Match], data: Calibration) -> dict[str, Tensor]:
    """Return by parameter |w| times the norm of its input over all batches, of the weight's shape.

    The norm is that of the input feature of a GEMM and of the input channel of a convolution, whatever the tap.
    """
    parameters = {m.parameter: m.value for m in matches}
    squares: dict[str, Tensor] = {}
    layers = {m.parameter: m for m in matches}
    groups: dict[str, int] = {}

    def add(call: Call) -> None:
        if call.transposed == layers[call.parameter].transposed:
            found = squares.get(call.parameter)
            new = channel_squares(call)
            squares[call.parameter] = new if found is None else found + new
            groups[call.parameter] = call.groups

    data.record(model, parameters, add)
    _all_reached("wanda", parameters, set(squares), "no linear layer or convolution is called with")
    scores = {}
    for name, match in layers.items():
        n, k = match.matrix_shape
        norms = squares[name].sqrt().reshape(groups[name], -1)
        norms = norms.repeat_interleave(n // groups[name], 0).repeat_interleave(k // norms.shape[1], 1)
        scores[name] = match.restore(match.matrix(match.value.detach()).abs() * norms.float())
    return scores


def _all_reached(importance: str, parameters: Mapping[str, Tensor], reached: set[str], what: str) -> None:
    missing = [name for name in parameters if name not in reached]
    if missing:
        raise CalibrationError(
            reason=f"on its batches {what} {', '.join(map(repr, missing[:3]))}, which importance={importance!r} ranks",
            remedy="Pass batches that use the whole model, or exclude the layers with ignored_layers.",
        )
