"""Depthwise detection, from Dynamo and from exported programs: any window, and the twins that are not depthwise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.capture import capture, detect, detect_exported
from fxprune.config import Config
from tests.oracle import detected, integers

X = integers(2, 6, 15, 17)
WINDOWS = [
    {"kernel_size": 3},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": 5, "padding": 2, "dilation": 2},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2)},
    {"kernel_size": 7, "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
    {"kernel_size": 1},
]


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_every_window_is_found_with_its_geometry(window: dict[str, object]) -> None:
    conv = nn.Conv2d(6, 6, groups=6, **window).eval()  # type: ignore[arg-type]
    assert detected(conv, X)[0] == {"depthwise": 1}
    for ctx in contexts(conv):
        (match,) = ctx.matches
        g = match.geometry
        assert g.x == tuple(X.shape) and g.y == tuple(conv(X).shape)
        assert torch.equal(F.conv2d(X, match.value, conv.bias, g.stride, g.padding, g.dilation, 6), conv(X))
        assert match.parameter == "weight" and match.matrix_shape == (6, conv.weight[0].numel())


def contexts(model: nn.Module, x: Tensor = X) -> list:  # type: ignore[type-arg]
    with torch.no_grad():
        (graph,) = capture(model, x)
        return [detect(graph, Config()), detect_exported(torch.export.export(model, (x,)))]


TWINS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "groups != channels": (lambda: nn.Conv2d(6, 6, 3, groups=3), X),
    "channel multiplier": (lambda: nn.Conv2d(6, 12, 3, groups=6), X),
    "one channel": (lambda: nn.Conv2d(1, 1, 3), X[:, :1]),
    "dense": (lambda: nn.Conv2d(6, 6, 3), X),
    "unbatched": (lambda: nn.Conv2d(6, 6, 3, groups=6), X[0]),
    "three dimensions": (lambda: nn.Conv3d(6, 6, 3, groups=6), X.unsqueeze(2).expand(2, 6, 4, 15, 17)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 6, 3, groups=6), X),
    "computed weight": (lambda: Scaled(), X),
    "reflected padding": (lambda: nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect", groups=3), X),
}


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean(), groups=6)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_same_padding_of_an_even_window_is_not_symmetric() -> None:
    assert detected(nn.Conv2d(6, 6, 4, padding="same", groups=6), X)[0] == {}


@pytest.mark.parametrize("name", TWINS)
def test_twin_is_not_depthwise(name: str) -> None:
    make, x = TWINS[name]
    assert detected(make().eval(), x)[0]["depthwise"] == 0


@pytest.mark.parametrize(
    "window", [{"kernel_size": 4, "padding": 3}, {"kernel_size": 3, "stride": 2, "dilation": 2}], ids=str
)
def test_one_dimension_is_an_image_of_height_one(window: dict[str, int]) -> None:
    conv, x = nn.Conv1d(6, 6, groups=6, **window).eval(), X[:, :, 0]  # type: ignore[arg-type]
    assert detected(conv, x)[0] == {"depthwise": 1}
    for ctx in contexts(conv, x):
        g = ctx.matches[0].geometry
        assert g.x == (2, 6, 1, 17) and g.y == tuple(conv(x).unsqueeze(2).shape)
        y = F.conv2d(x.unsqueeze(2), conv.weight.unsqueeze(2), conv.bias, g.stride, g.padding, g.dilation, 6)
        assert torch.equal(y.squeeze(2), conv(x))


def test_reflected_padding_leaves_an_unpadded_depthwise() -> None:
    conv = nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect", groups=6)
    assert detected(conv, X)[0] == {"depthwise": 1}
    assert all(c.matches[0].geometry.padding == (0, 0) for c in contexts(conv.eval()))


def test_a_shared_layer_is_two_matches_of_one_parameter() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(6, 6, 3, padding=1, groups=6)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    model = Twice().eval()
    assert detected(model, X)[0] == {"depthwise": 2}
    for ctx in contexts(model):
        assert {m.parameter for m in ctx.matches} == {"conv.weight"}


def test_names_are_those_of_named_parameters() -> None:
    model = nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.Sequential(nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6))).eval()
    for ctx in contexts(model):
        assert [m.parameter for m in ctx.matches] == ["0.weight", "1.1.weight"]
        assert all(m.value is not None and m.name + ".weight" == m.parameter for m in ctx.matches)
