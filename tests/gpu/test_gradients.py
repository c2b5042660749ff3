"""Gradients on a GPU: gradcheck, exact on integers, and behind activations those of the CPU.

The kernels have no float64, which gradcheck's finite differences want because of their error. On integers there is none: the
operators are linear in each operand, so a central difference with step 1 equals the gradient, in 16 bits too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cuda.test_tile_gradients import conv_case, gemm_case
from tests.gpu.place import DTYPES, OPERATOR_SAMPLES, in_one_type
from tests.integers import bitmap, generator, integers
from tests.ops.test_ops import whole, with_grad

CALL = torch.ops.fxprune
WITHOUT_GRADIENT = ("depthwise_pool", "nm_prune", "nm_mm")
SAMPLES = [s for s in OPERATOR_SAMPLES if s.values[0].name not in WITHOUT_GRADIENT]
# an element of an operand is two runs of the kernel, one of the result two of its backward
MOST, MOST_RESULTS = 200, 320


@pytest.fixture(autouse=True)
def full_precision() -> Iterator[None]:
    """What PyTorch convolves for a gradient is compared in all of float32."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def gemm(extras: str = "") -> tuple[Any, ...]:
    """Two tiles of 16 features, less than half of them kept: gradients over the kept weights."""
    case, gen = gemm_case((2, 12, 2), 32, 16, keep=0.4), generator(1)
    bias = integers(gen, 32) if "b" in extras else None
    residual = integers(gen, 2, 32, 2) if "r" in extras else None
    gate = integers(gen, 2, 12) if "g" in extras else None
    return (case.x.float(), *case.packed, bias, residual, gate, 32, 16, 1, "none")


def conv(groups: int = 1) -> tuple[Any, ...]:
    case = conv_case((1, 2, 4, 5), 32, 16, (3, 3), 2, 1, groups=groups, keep=0.3)
    return (case.x.float(), *case.packed, integers(generator(2), 32), None, 32, 16, *case.window, "none")


def depthwise(kernel: int, stride: int) -> tuple[Any, ...]:
    gen = generator(kernel, stride)
    taps = bitmap(torch.rand(2, kernel * kernel, generator=gen) < 0.5)
    window = ([kernel] * 2, [stride] * 2, [kernel // 2] * 2, [1, 1])
    return (integers(gen, 1, 2, 4, 6), integers(gen, 2, kernel * kernel), taps, integers(gen, 2), *window, "none")


KEPT = {
    "tile_gemm": ("tile_gemm", gemm()), "tile_gemm with all": ("tile_gemm", gemm("brg")), "tile_conv": ("tile_conv", conv()),
    "tile_conv in groups": ("tile_conv", conv(2)), "depthwise 3x3": ("depthwise_taps", depthwise(3, 1)),
    "depthwise 5x5, stride 2": ("depthwise_taps", depthwise(5, 2)), "depthwise 7x7": ("depthwise_taps", depthwise(7, 1)),
}  # fmt: skip


def check(name: str, args: tuple[Any, ...], dtype: torch.dtype | None = None) -> None:
    """args: integers. Large operands stay constants."""
    given = with_grad(in_one_type(args, dtype))
    ready = [a.detach() if isinstance(a, Tensor) and a.numel() > MOST else a for a in given]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*double precision.*")
        operator = getattr(CALL, name).default
        assert torch.autograd.gradcheck(operator, ready, eps=1.0, atol=0.0, rtol=0.0, check_undefined_grad=False)


def few(op: Any, args: tuple[Any, ...]) -> bool:
    least = min(a.numel() for a in args if isinstance(a, Tensor) and a.is_floating_point())
    return least <= MOST and op.fake(*args).numel() <= MOST_RESULTS


@pytest.mark.parametrize(("op", "args"), [s for s in SAMPLES if few(*s.values)])
def test_gradcheck(op: Any, args: tuple[Any, ...]) -> None:
    check(op.name, whole(args, 5, "none"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", KEPT)
def test_gradcheck_over_kept_weights(case: str, dtype: torch.dtype) -> None:
    check(*KEPT[case], dtype)


@pytest.mark.parametrize(("op", "args"), SAMPLES)
def test_gradients_match_the_cpu(op: Any, args: tuple[Any, ...]) -> None:
    """With the activations of the samples."""
    results = []
    for given in (args, in_one_type(args)):
        ready = with_grad(given)
        output = getattr(CALL, op.name)(*ready)
        grad = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).to(output.dtype)
        leaves = [a for a in ready if isinstance(a, Tensor) and a.requires_grad]
        results.append([output, *torch.autograd.grad(output, leaves, grad)])
    for cpu, gpu in zip(*results, strict=True):
        # bfloat16: a GPU rounds the gradient behind an activation before it multiplies
        tolerance = 1e-4 if args[0].dtype == torch.float32 else 4e-2
        torch.testing.assert_close(gpu.cpu().to(cpu.dtype), cpu, rtol=tolerance, atol=tolerance)
