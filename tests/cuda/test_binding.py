"""The binding of the CUDA operators, built on the simulator: checks, both layouts, and what it hands to the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fxprune.lowering.kernels.cuda import OPERATORS
from torch import Tensor

from fxprune.ops import OPS
from fxprune.ops import cuda_nm_image as nm_image
from fxprune.ops import cuda_tf32_image as tf32_image
from fxprune.ops import cuda_tile_image as tile_image
from fxprune.ops.operator import Operator
from tests.cuda.binding import binding
from tests.cuda.test_tile_gemm_halved import halved

CUDA_OPS = [op for op in OPS if op.name in OPERATORS]
SAMPLES = [pytest.param(op, args, id=f"{op.name}-{i}") for op in CUDA_OPS for i, args in enumerate(op.samples())]
# what only the packer checks: values of index lists would have to be read back from a GPU
ON_THE_HOST = {"index", "columns", "tile_ptr", "float32", "nnz|values"}
BAD = [
    pytest.param(op, args, message, id=f"{op.name}-{i}")
    for op in CUDA_OPS
    for i, (args, message) in enumerate(op.bad_samples())
]


@pytest.fixture
def call() -> Callable[..., Tensor]:
    """Return call(operator, *arguments)."""
    return binding()


def cast(args: tuple[Any, ...], dtype: torch.dtype) -> list[Any]:
    return [a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("op", "args"), SAMPLES)
def test_samples(call: Callable[..., Tensor], op: Operator, args: tuple[Any, ...], dtype: torch.dtype) -> None:
    given = cast(args, dtype)
    if op.name == "nm_mm" and dtype == torch.float32:
        with pytest.raises(RuntimeError, match="x must be float16 or bfloat16"):
            call(op.name, *given)
        return
    got = call(op.name, *given)
    expected = op.reference(*[a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in given])
    outputs = [y if isinstance(y, list) else [y] for y in (got, expected, op.fake(*given))]
    for ours, exact, fake in zip(*outputs, strict=True):
        assert ours.shape == exact.shape and ours.dtype == dtype and ours.stride() == fake.stride()
        torch.testing.assert_close(ours, exact.to(dtype), atol=2e-2 if dtype == torch.bfloat16 else 2e-3, rtol=2e-2)


@pytest.mark.parametrize(("op", "args", "message"), BAD)
def test_bad_samples(call: Callable[..., Tensor], op: Operator, args: tuple[Any, ...], message: str) -> None:
    """Whatever shapes and types tell is refused. What values tell is not looked at, and not run here."""
    # a missing value may be a kept row of the last tile, where that is one feature narrower
    if message in ON_THE_HOST or (op.name, message) == ("tile_conv", "values"):
        pytest.skip("told by values, or legal on a GPU")
    with pytest.raises(RuntimeError, match=message):
        call(op.name, *args)


def test_types_are_not_mixed(call: Callable[..., Tensor]) -> None:
    op = next(op for op in OPS if op.name == "tile_gemm")
    args = list(next(op.samples()))
    with pytest.raises(RuntimeError, match="values must have the type of x"):
        call("tile_gemm", args[0], args[1].half(), *args[2:])
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16"):
        call("tile_gemm", args[0].double(), *args[1:])
    with pytest.raises(RuntimeError, match="index must be int32"):
        call("tile_gemm", *args[:2], args[2].long(), *args[3:])


@pytest.mark.parametrize("feature_dim", (1, -1))
def test_an_image_in_place_of_values(call: Callable[..., Tensor], feature_dim: int) -> None:
    op = next(op for op in OPS if op.name == "tile_gemm")
    for sample in op.samples():
        if sample[10] != feature_dim:
            continue
        args = cast(sample, torch.bfloat16)
        image = tile_image.build(args[1], args[3], args[9], len(args[4]))
        assert torch.equal(call("tile_gemm", args[0], image, *args[2:]), call("tile_gemm", *args))
        with pytest.raises(RuntimeError, match="values must have"):
            call("tile_gemm", args[0], image[:-1], *args[2:])
        elsewhere = torch.cat([image[:4], image])[4:]  # bulk copies begin at 16 bytes
        with pytest.raises(RuntimeError, match="a multiple of 16 bytes"):
            call("tile_gemm", args[0], elsewhere, *args[2:])


@pytest.mark.parametrize("feature_dim", (1, -1))
def test_an_image_of_float32_values(call: Callable[..., Tensor], feature_dim: int) -> None:
    """Rounded to TF32, as tokens are on their way: integers are not changed by it."""
    for sample in next(op for op in OPS if op.name == "tile_gemm").samples():
        if sample[10] != feature_dim:
            continue
        args = [a.round() if isinstance(a, Tensor) and a.is_floating_point() else a for a in cast(sample, torch.float32)]
        image = tf32_image.build(args[1])
        assert torch.equal(call("tile_gemm", args[0], image, *args[2:]), call("tile_gemm", *args))
        with pytest.raises(RuntimeError, match="values must have"):
            call("tile_gemm", args[0], image[:-1], *args[2:])
        with pytest.raises(RuntimeError, match="values must have the type of x"):
            call("tile_gemm", args[0], image.view(torch.int8), *args[2:])


@pytest.mark.parametrize("feature_dim", (1, -1))
def test_an_image_of_values_kept_two_in_four(call: Callable[..., Tensor], feature_dim: int) -> None:
    for sample in next(op for op in OPS if op.name == "tile_gemm").samples():
        if sample[10] != feature_dim:
            continue
        x, values, index, tile_ptr, columns, *rest = cast(sample, torch.bfloat16)
        values = halved(values, tile_ptr, rest[4], len(columns), torch.Generator().manual_seed(0))
        image = nm_image.build(values, tile_ptr, rest[4], len(columns))
        dense = call("tile_gemm", x, values, index, tile_ptr, columns, *rest)
        torch.testing.assert_close(call("tile_gemm", x, image, index, tile_ptr, columns, *rest), dense)
        with pytest.raises(RuntimeError, match="values must have"):
            call("tile_gemm", x, image[:-1], index, tile_ptr, columns, *rest)
        window = ([1, 1], [1, 1], [0, 0], [1, 1])
        if x.dim() == 4 and rest[2] is None:
            with pytest.raises(RuntimeError, match="values must have the type of x"):
                call("tile_conv", x, image, index, tile_ptr, columns, *rest[:2], *rest[3:5], *window, 1, "none")
