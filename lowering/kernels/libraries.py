"""Products of a left operand kept two in four by the libraries that come with PyTorch: cuSPARSELt, and CUTLASS on sm_8x.

    fxprune_library::nm_mm(x, weight) = kept(x) @ weight        as fxprune::nm_mm

Neither is trusted. On the first use on a card each is asked for a product of small integers, which must be exact, also
replayed from a CUDA graph; one that is missing, refuses, or is wrong has that as its reason, and the next one is asked.
Whether the one that is right is also fast, ``lowering/measure_gradient.py`` decides layer by layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...ops import nm_mm
from .impl import Impl

NAMESPACE = "fxprune_library"
HALVES = (torch.float16, torch.bfloat16)
_ALIGN = 64  # rows and K of what is compressed, at least what either library asks for; columns need 8
_SHAPES = ((64, 128, 72), (130, 200, 24))  # rows, K, N of the products that are asked for
Product = Callable[[Tensor, Tensor], Tensor]


def _cusparselt(x: Tensor, weight: Tensor) -> Tensor:
    return torch._cslt_sparse_mm(torch._cslt_compress(x), weight)  # type: ignore[no-any-return]


def _cutlass(x: Tensor, weight: Tensor) -> Tensor:
    values, places = torch.ops.aten._to_sparse_semi_structured(x)
    # its right operand lies column by column
    by_columns = weight.t().contiguous().t()
    return torch.ops.aten._sparse_semi_structured_mm(values, places, by_columns)  # type: ignore[no-any-return]


PRODUCTS: dict[str, Product] = {"cusparselt": _cusparselt, "cutlass": _cutlass}


def multiply(x: Tensor, weight: Tensor, product: Product) -> Tensor:
    """x: (rows, K), weight: (K, N), of 16 bits -> kept(x) @ weight, through zeros up to the sizes that libraries take."""
    rows, k, n = *x.shape, weight.shape[1]
    kept = torch.ops.fxprune.nm_prune(x.contiguous(), None, 2, 4, -1, 1, "magnitude", 0)
    kept = F.pad(kept, (0, -k % _ALIGN, 0, -rows % _ALIGN))
    return product(kept, F.pad(weight, (0, -n % 8, 0, -k % _ALIGN)).contiguous())[:rows, :n].contiguous()


@cache
def missing(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a library's products are not used on a GPU, ``None`` when they are right there."""
    if dtype not in HALVES:
        return f"needs float16 or bfloat16, got {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda":
        return f"needs a GPU, got {device.type}"
    return probe(PRODUCTS[name], device, dtype)


def probe(product: Product, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return what is wrong with a product on a device, ``None`` when it is exact on small integers, replayed as well."""
    generator = torch.Generator().manual_seed(0)
    try:
        for rows, k, n in _SHAPES:
            x, weight = (torch.randint(-2, 3, size, generator=generator).to(device, dtype) for size in ((rows, k), (k, n)))
            right = nm_mm.reference(x.cpu().float(), weight.cpu().float())
            if not torch.equal(multiply(x, weight, product).cpu().float(), right):
                return "its product of integers is wrong"
            if not torch.equal(_replayed(partial(multiply, x, weight, product), device).cpu().float(), right):
                return "its product is wrong when a CUDA graph replays it"
    except Exception as error:  # a library may be missing, refuse the card, or refuse to be captured
        lines = str(error).splitlines() or [type(error).__name__]
        return lines[0][:160]
    return None


def _replayed(run: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Return the result of the replay of a capture; on the CPU, where none exist, of a second call."""
    if device.type != "cuda":
        return run()
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream(device).wait_stream(stream)
    with torch.cuda.graph(graph):
        result = run()
    result.zero_()
    graph.replay()
    torch.cuda.synchronize(device)
    return result


def chosen(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the first library whose products are right on a device."""
    return next((name for name in PRODUCTS if missing(name, device, dtype) is None), None)


def define() -> torch.library.Library:
    """Register the operator; it lives as long as the result."""
    lib = torch.library.Library(NAMESPACE, "FRAGMENT")
    lib.define("nm_mm(Tensor x, Tensor weight) -> Tensor")
    lib.impl("nm_mm", _nm_mm, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::nm_mm", nm_mm.fake, lib=lib)
    return lib


def _nm_mm(x: Tensor, weight: Tensor) -> Tensor:
    name = chosen(x.device, x.dtype)
    if name is None:  # a graph that was compiled on another card
        return torch.ops.fxprune.nm_mm(x, weight)  # type: ignore[no-any-return]
    return multiply(x, weight, PRODUCTS[name])


def _supports(name: str) -> Callable[..., str | None]:
    def supports(x: Any, weight: Any = None) -> str | None:
        """On a GPU, in 16 bits, where the library's products of integers are exact."""
        return missing(name, x.device, x.dtype) if isinstance(x, Tensor) else None

    return supports


def _runs(product: Product) -> Callable[..., Any]:
    return lambda x, weight: multiply(x, weight, product)


IMPLS = tuple(Impl("nm_mm", name, _runs(product), _supports(name)) for name, product in PRODUCTS.items())
