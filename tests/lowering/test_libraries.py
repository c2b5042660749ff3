"""Libraries' 2:4 products: what is asked of them, what becomes of those that are wrong, and who multiplies then."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fxprune.lowering.kernels import KernelTables, libraries
from torch import Tensor

from fxprune.gradients import GradientLayer, GradientTimes, gradient_table
from fxprune.ops import nm_mm

CPU = torch.device("cpu")
HALF = torch.float16


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    libraries.missing.cache_clear()


def exact(x: Tensor, weight: Tensor) -> Tensor:
    assert x.shape[0] % 64 == x.shape[1] % 64 == weight.shape[1] % 8 == 0, "libraries refuse other sizes"
    assert weight.is_contiguous() and bool(((x.unflatten(1, (-1, 4)) != 0).sum(2) <= 2).all())
    return (x.float() @ weight.float()).to(x.dtype)


def rounded(x: Tensor, weight: Tensor) -> Tensor:
    return exact(x, weight) + 1 / 64


def wrong_rows(x: Tensor, weight: Tensor) -> Tensor:
    return exact(x, weight).roll(1, 0)


def refused(x: Tensor, weight: Tensor) -> Tensor:
    raise RuntimeError("architecture mismatch\nof this card")


@pytest.mark.parametrize("dtype", libraries.HALVES, ids=str)
def test_an_exact_product_is_right(dtype: torch.dtype) -> None:
    assert libraries.probe(exact, CPU, dtype) is None


@pytest.mark.parametrize(
    ("product", "reason"),
    ((rounded, "its product of integers is wrong"), (wrong_rows, "is wrong"), (refused, "architecture mismatch")),
)
def test_one_that_is_not_says_why(product: libraries.Product, reason: str) -> None:
    found = libraries.probe(product, CPU, HALF)
    assert found is not None and reason in found and "\n" not in found


def test_a_wrong_replay_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    replayed = libraries._replayed
    monkeypatch.setattr(libraries, "_replayed", lambda run, device: replayed(run, device) * 2)
    assert libraries.probe(exact, CPU, HALF) == "its product is wrong when a CUDA graph replays it"


@pytest.mark.parametrize("shape", ((64, 64, 8), (1, 4, 1), (70, 130, 13)), ids=str)
def test_odd_sizes_are_filled_up(shape: tuple[int, int, int]) -> None:
    rows, k, n = shape
    x, weight = (torch.randint(-2, 3, s, generator=torch.Generator().manual_seed(k)).half() for s in ((rows, k), (k, n)))
    assert torch.equal(libraries.multiply(x, weight, exact), nm_mm.reference(x, weight))


def test_the_first_that_is_right_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"cusparselt": "architecture mismatch", "cutlass": None}
    monkeypatch.setattr(libraries, "missing", lambda name, device, dtype: reasons[name])
    assert libraries.chosen(CPU, HALF) == "cutlass"
    monkeypatch.setitem(libraries.PRODUCTS, "cutlass", exact)
    x, weight = torch.ones(3, 8).half(), torch.ones(8, 2).half()
    assert torch.equal(torch.ops.fxprune_library.nm_mm(x, weight), nm_mm.reference(x, weight))


def test_without_one_our_own_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "PRODUCTS", {"cusparselt": refused})
    x, weight = torch.ones(3, 8).bfloat16(), torch.ones(8, 2).bfloat16()
    assert libraries.chosen(CPU, torch.bfloat16) is None
    assert torch.equal(torch.ops.fxprune_library.nm_mm(x, weight), nm_mm.reference(x, weight))


def test_the_tables_say_why() -> None:
    impls = {impl.provider: impl for impl in KernelTables().candidates("nm_mm")}
    assert {"cuda", "cusparselt", "cutlass"} <= set(impls)
    for name in libraries.PRODUCTS:
        assert impls[name].supports(torch.ones(2, 4)) == "needs float16 or bfloat16, got float32"
        assert impls[name].supports(torch.ones(2, 4).half()) == "needs a GPU, got cpu"


def test_the_fastest_way_multiplies() -> None:
    for times, skips, by_library in (
        (GradientTimes(3.0, 2.0, 1.5, 1.0), True, True),
        (GradientTimes(3.0, 2.0, 1.0, 1.5), True, False),
        (GradientTimes(3.0, 1.0, 1.5, 1.2), False, False),
        (GradientTimes(3.0, 2.0), False, False),
    ):
        layer = GradientLayer("fc", 1, None, times)
        assert (layer.skips, layer.by_library) == (skips, by_library)
        assert ("by a library" in str(gradient_table([layer], "2:4"))) == by_library
    assert GradientLayer("fc", 1, "dense", GradientTimes(3.0, 2.0, 1.5, 1.0)).by_library is False
