"""Where regions are formed and where not, and that each equals the masked dense model bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.ops.region import DEPTHWISE, GEMM, MEAN, POOL
from tests.lowering.chains import Inverted, formed, sparse
from tests.oracle import assert_exact, compiled, integers, poisoned
from tests.toys import run


def image(batch: int = 2, channels: int = 16, size: int = 8) -> Tensor:
    return integers(batch, channels, size, size, seed=batch)


def pointwise(c: int, n: int) -> nn.Conv2d:
    return nn.Conv2d(c, n, 1)


def depthwise(c: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c, c, 3, stride, 1, groups=c)


@pytest.fixture(params=(1, 2), ids=("one thread", "two threads"))
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("batch", (1, 2, 3, 5))
@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("gated", (False, True))
def test_a_block_is_one_region(gated: bool, residual: bool, batch: int, threads: int) -> None:
    with poisoned():
        found = formed(sparse(Inverted(gated=gated, residual=residual)), image(batch))
    assert found.count == 1 and found.singles() == 0
    assert found.codes() == [GEMM, DEPTHWISE, *([MEAN, GEMM, GEMM] if gated else []), GEMM]


@pytest.mark.parametrize("pool", (1, 2, 3))
@pytest.mark.parametrize(
    ("size", "stride", "window"), [(7, 1, 3), (14, 1, 5), (29, 1, 3), (40, 1, 5), (41, 2, 3), (45, 1, 7), (80, 2, 5)]
)
def test_one_image_is_cut_by_feature_or_in_bands(size: int, stride: int, window: int, pool: int) -> None:
    """Small planes are cut by feature and the projection's K with them, large ones in bands with the rows around them."""
    middle = nn.Conv2d(96, 96, window, stride, window // 2, groups=96)
    chain = nn.Sequential(pointwise(16, 96), nn.ReLU6(), middle, nn.ReLU6(), pointwise(96, 16), nn.GELU())
    before = torch.get_num_threads()
    torch.set_num_threads(pool)
    try:
        with poisoned():
            found = formed(sparse(chain), image(1, size=size))
    finally:
        torch.set_num_threads(before)
    assert found.count == 1 and found.codes() == [GEMM, DEPTHWISE, GEMM]


def test_a_value_lives_until_its_last_reader() -> None:
    """Every value has one shape, so room given away too early, or a wrong number, changes numbers only."""
    assert formed(sparse(Inverted(gated=False, widen=1)), image()).count == 1


def test_blocks_follow_each_other_in_one_region() -> None:
    chain = nn.Sequential(Inverted(residual=False), nn.ReLU6(), depthwise(16, 2), nn.ReLU6(), pointwise(16, 24))
    found = formed(sparse(chain), image(3))
    assert found.count == 1 and found.singles() == 0 and len(found.codes()) == 8


def test_a_mean_over_one_pixel_moves_nothing() -> None:
    """A pooled head: 1x1 convolution of one pixel, pooling again, classifier."""
    pool = nn.AdaptiveAvgPool2d(1)
    head = (pointwise(24, 32), nn.ReLU6(), pool, nn.Flatten(), nn.Linear(32, 20))
    found = formed(sparse(nn.Sequential(pointwise(16, 24), pool, *head)), image(3))
    assert found.count == 1 and found.singles() == 0 and found.codes() == [GEMM, MEAN, GEMM, GEMM]


@pytest.mark.parametrize("ceil", (False, True))
def test_max_pooling_is_a_step(ceil: bool) -> None:
    """Behind a kernel of the region, and unless the window leaves the image."""
    stem = (nn.MaxPool2d(2), pointwise(16, 24), nn.ReLU6(), nn.MaxPool2d(3, 2, 1, ceil_mode=ceil), pointwise(24, 16))
    found = formed(sparse(nn.Sequential(*stem, depthwise(16))), image(3, size=18))
    assert found.count == 1 and found.codes() == ([GEMM, DEPTHWISE] if ceil else [GEMM, POOL, GEMM, DEPTHWISE])


class Downsampled(nn.Module):
    """A residual block whose shortcut is a strided 1x1 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = pointwise(16, 24), depthwise(24, 2)
        self.project, self.shortcut = pointwise(24, 16), nn.Conv2d(24, 16, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.stem(x))
        return self.project(F.relu6(self.depthwise(y))) + self.shortcut(y)


@pytest.mark.parametrize("size", (8, 13))
@pytest.mark.parametrize("batch", (1, 3))
def test_a_strided_shortcut_is_a_step(batch: int, size: int) -> None:
    found = formed(sparse(Downsampled()), image(batch, size=size))
    assert found.count == 1 and found.singles() == 0 and sorted(found.codes()) == [DEPTHWISE, GEMM, GEMM, GEMM, POOL]


def test_a_mean_over_one_pixel_of_an_input_stays_out() -> None:
    head = (pointwise(16, 32), nn.ReLU6(), nn.Flatten(), nn.Linear(32, 20))
    found = formed(sparse(nn.Sequential(nn.AdaptiveAvgPool2d(1), *head)), image(3, size=1))
    assert found.codes() == [GEMM, GEMM]


# ---- what keeps nodes out of a region, or closes it ----


class Lone(nn.Module):
    """One kernel between dense calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = pointwise(16, 24)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.layer(F.max_pool2d(x, 2)), 2)


def test_one_kernel_is_no_region() -> None:
    found = formed(sparse(Lone()), image())
    assert found.count == 0 and found.singles() == 1


def add_(state: Tensor) -> None:
    state.add_(1)


def setitem(state: Tensor) -> None:
    state[:, 0] = 3


def iadd(state: Tensor) -> None:
    state += 1


def out(state: Tensor) -> None:
    torch.neg(state.clone(), out=state)


class Written(nn.Module):
    """What the first kernel reads is written before the second."""

    def __init__(self, write: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([pointwise(16, 16), depthwise(16), pointwise(16, 16)])
        self.write = write

    def forward(self, state: Tensor) -> Tensor:
        y = F.relu6(self.layers[0](state))
        self.write(state)
        return self.layers[2](F.relu6(self.layers[1](y)))


@pytest.mark.parametrize("write", [add_, setitem, iadd, out], ids=lambda w: w.__name__)
def test_a_write_closes_the_region(write: Callable[[Tensor], None]) -> None:
    found = formed(sparse(Written(write)), image())
    assert found.count == 1 and found.singles() == 1 and found.codes() == [DEPTHWISE, GEMM]


class Between(nn.Module):
    """Two pairs of kernels with a call between them: on the pairs' value, or beside it."""

    def __init__(self, dependent: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([pointwise(16, 16), depthwise(16), pointwise(16, 16), depthwise(16)])
        self.dependent = dependent

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = F.relu6(self.layers[1](F.relu6(self.layers[0](x))))
        side = torch.cumsum(y if self.dependent else x, 1)
        y = torch.cumsum(y, 2) if self.dependent else y
        return self.layers[3](F.relu6(self.layers[2](y))), side


@pytest.mark.parametrize(("dependent", "regions"), [(True, 2), (False, 1)])
def test_a_call_between_splits_only_what_depends_on_it(dependent: bool, regions: int) -> None:
    found = formed(sparse(Between(dependent)), image())
    assert found.count == regions and found.singles() == 0


class TwoBatches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Inverted(), Inverted(gated=False)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(y)


@pytest.mark.parametrize(("batches", "regions"), [((2, 3), 2), ((2, 2), 1)])
def test_a_region_has_one_batch_size(batches: tuple[int, int], regions: int) -> None:
    found = formed(sparse(TwoBatches()), image(batches[0]), image(batches[1]))
    assert found.count == regions and found.singles() == 0


def test_training_has_no_regions() -> None:
    x = image().requires_grad_()
    assert formed(sparse(Inverted()), x, grad=True).count == 0


@pytest.mark.parametrize("gated", (False, True))
def test_an_intermediate_used_outside_is_an_output_too(gated: bool) -> None:
    found = formed(sparse(Inverted(gated=gated, seen=True)), image())
    assert found.count == 1
    assert len(found.regions[0].args[4]) == 2


def test_a_mean_used_outside_is_an_output_too() -> None:
    class Seen(Inverted):
        def forward(self, x: Tensor) -> Any:
            y = F.relu6(self.bn2(self.depthwise(F.relu6(self.bn1(self.expand(x))))))
            mean = y.mean((2, 3), keepdim=True)
            gate = F.relu6(self.excite(F.relu(self.squeeze(mean))))
            return self.bn3(self.project(y * gate)), torch.cumsum(mean, 1), torch.cumsum(gate, 1)

    found = formed(sparse(Seen()), image())
    assert found.count >= 1


class Rows(nn.Module):
    """Linear layers over rows that are pixels, not images; a convolution beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.conv = nn.Linear(16, 64), nn.Linear(64, 64), pointwise(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.flatten(2).transpose(1, 2).reshape(-1, 16)
        return self.second(F.relu6(self.first(rows))), self.conv(x)


def test_rows_that_are_not_images_stay_out() -> None:
    found = formed(sparse(Rows()), image())
    assert found.count == 0 and found.singles() == 3


# ---- through torch.compile ----


@pytest.mark.parametrize("fallback", ("eager", "inductor"))
def test_dynamic_batches_through_compile(fallback: str, threads: int) -> None:
    model = sparse(Inverted())
    fast = compiled(model, dynamic=True, fallback=fallback)
    for batch in (2, 3, 5, 2):
        x = image(batch)
        assert_exact(run(fast.call, x), run(model, x), f"batch {batch}")
    assert fast.contexts[0].counts["form_regions"] == 1


def test_new_weights_reach_the_region() -> None:
    model = sparse(Inverted())
    fast, x = compiled(model), image()
    assert_exact(run(fast.call, x), run(model, x))
    with torch.no_grad():
        model.project.weight.mul_(2)
        model.depthwise.weight.mul_(-1)
    assert_exact(run(fast.call, x), run(model, x))
    assert len(fast.graphs) == 1
