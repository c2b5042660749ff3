"""Detection of the other convolutions, from Dynamo and from exported programs, and the reasons for what stays dense."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.capture import capture, detect
from fxprune.config import Config
from tests.oracle import detected, integers

X, ROW, CUBE = integers(2, 6, 11, 9), integers(2, 6, 13), integers(1, 6, 4, 5, 5)


class Uses(nn.Module):
    """A Parameter of ``shape``, used by ``body(x, w)``."""

    def __init__(self, body: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.weight, self.body = nn.Parameter(torch.randn(shape)), body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x, self.weight)


FOUND: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "3x3": (lambda: nn.Conv2d(6, 9, 3), X),
    "3x3 strided and dilated": (lambda: nn.Conv2d(6, 9, 3, stride=2, padding=2, dilation=2), X),
    "1x7": (lambda: nn.Conv2d(6, 9, (1, 7), padding=(0, 3)), X),
    "same": (lambda: nn.Conv2d(6, 9, 5, padding="same"), X),
    "1x1 padded": (lambda: nn.Conv2d(6, 9, 1, padding=1), X),
    "1x1 in groups": (lambda: nn.Conv2d(6, 9, 1, groups=3), X),
    "groups": (lambda: nn.Conv2d(6, 12, 3, groups=2), X),
    "channel multiplier": (lambda: nn.Conv2d(6, 12, 3, groups=6), X),
    "one channel": (lambda: nn.Conv2d(1, 1, 3), X[:, :1]),
    "a sequence": (lambda: nn.Conv1d(6, 9, 3, stride=2, padding=1), ROW),
    "a sequence, same": (lambda: nn.Conv1d(6, 9, 3, padding="same", bias=False), ROW),
}


@pytest.mark.parametrize("name", FOUND)
def test_is_found_with_its_geometry(name: str) -> None:
    make, x = FOUND[name]
    layer = make().eval()
    assert detected(layer, x)[0] == {"conv": 1}
    (match,) = detect(capture(layer, x)[0], Config()).matches
    g, value = match.geometry, match.value
    y = F.conv2d(x.reshape(g.x), value.reshape(*value.shape[:2], *g.kernel), layer.bias, *window(g))
    assert torch.equal(y.reshape(layer(x).shape), layer(x)) and g.y == tuple(y.shape)
    assert match.matrix_shape == (value.shape[0], value[0].numel())
    assert all((value.shape[0] // g.groups) % match.tile_width(wanted) == 0 for wanted in (1, 4, 8)) or g.groups == 1


def window(g):  # type: ignore[no-untyped-def]
    return g.stride, g.padding, g.dilation, g.groups


REFUSED: dict[str, tuple[Callable[[], nn.Module], Tensor, str, str]] = {
    "unbatched": (lambda: nn.Conv2d(6, 9, 3), X[0], "conv", "no batch dimension"),
    "unbatched sequence": (lambda: nn.Conv1d(6, 9, 3), ROW[0], "conv", "no batch dimension"),
    "even same": (lambda: nn.Conv2d(6, 9, 4, padding="same"), X, "conv", "pads one side more"),
    "computed weight": (
        lambda: Uses(lambda x, w: F.conv2d(x, w * x.mean()), 9, 6, 3, 3),
        X,
        "conv",
        "computed in the graph",
    ),
    "cubes": (lambda: nn.Conv3d(6, 9, 3), CUBE, "conv3d", "three-dimensional"),
    "depthwise cubes": (lambda: nn.Conv3d(6, 6, 3, groups=6), CUBE, "conv3d", "three-dimensional"),
    "transposed": (lambda: nn.ConvTranspose2d(6, 9, 3), X, "conv_transpose2d", "transposed"),
    "transposed sequence": (lambda: nn.ConvTranspose1d(6, 9, 3), ROW, "conv_transpose1d", "transposed"),
    "linear of a computed weight": (
        lambda: Uses(lambda x, w: F.linear(x, w.repeat(2, 1)), 4, 9),
        X,
        "linear",
        "computed in the graph by repeat",
    ),
    "weight on the left": (lambda: Uses(lambda x, w: w @ x.t(), 4, 13), ROW[0], "linear", "left factor of the product"),
    "batch of weights": (lambda: Uses(lambda x, w: torch.matmul(x, w), 2, 13, 4), ROW, "linear", "has 3 dimensions"),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_dense_says_why(name: str) -> None:
    make, x, kind, reason = REFUSED[name]
    layer = make().eval()
    assert detected(layer, x)[0] == {}
    (row,) = fxprune.explain(layer, x).to_dict()["rows"]
    assert row["kind"] == kind and row["kernel"] == "dense" and reason in row["decision"]


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "of activations": lambda x, w: (x @ x.transpose(1, 2)) * w.sum(),
    "with what depends on the input": lambda x, w: F.linear(x, w * x.mean()),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_activations_is_no_layer(name: str) -> None:
    layer = Uses(PRODUCTS[name], 4, 13).eval()
    assert detected(layer, ROW)[0] == {}
    assert fxprune.explain(layer, ROW).rows == []


def test_matches_and_refusals_name_every_layer_once() -> None:
    model = nn.Sequential(
        nn.Conv2d(6, 6, 3), nn.ConvTranspose2d(6, 4, 3), nn.Conv2d(4, 8, 1), nn.Flatten(2), nn.Linear(99, 3)
    )
    rows = fxprune.explain(model.eval(), X).to_dict()["rows"]
    found = {row["layer"]: row["kind"] for row in rows}
    assert found == {"0": "conv", "1": "conv_transpose2d", "2": "pointwise", "4": "linear"} and len(rows) == 4
