"""The GPU kernels on the host: builds the simulator of csrc/sim and calls it on tensors.

A :class:`Fault` is what a kernel did that it must not: a race, an access out of bounds, a deadlock. Environment:
CXX, FXPRUNE_SANITIZE=1 (a build under the address and undefined-behaviour sanitizers, see sanitize.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fxprune.ops import cuda_nm_image
from fxprune.ops.activation import NAMES
from fxprune.ops.nm_prune import FUNCTIONS

ROOT = Path(__file__).resolve().parents[2]
# operators.cpp is for the binding, which needs torch (test_binding.py)
SOURCES = sorted(p for p in (ROOT / "csrc/sim").glob("*.cpp") if p.name != "operators.cpp")
SANITIZE = os.environ.get("FXPRUNE_SANITIZE") == "1"
FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"] if SANITIZE else ["-O2", "-g0"]
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ELEMENTS = (torch.float32, torch.float16, torch.bfloat16)
# the functions that return a text or null
MESSAGES = ("depthwise", "dsconv", "nm_prune", "tile_image", "tile_gemm", "tile_conv", "tile_pack", "transpose")
MESSAGES += ("depthwise_gradient", "tile_gradient", "nm_gemm", "case", "run_case")
SEEDS = (0, 1, 2)  # threads in order, in reverse, shuffled


class Fault(AssertionError):
    """A kernel broke a rule of the simulated machine."""


class Plant(enum.IntEnum):
    """The mistakes of csrc/sim/machine.h."""

    NONE = 0
    SHORT_WAIT = 1
    NO_BARRIER = 2
    LANE_MAP = 3
    SWIZZLE = 4
    NO_PROXY_FENCE = 5
    NO_PHASE_WAIT = 6
    EARLY_ARRIVE = 7
    NO_MATRIX_FENCE = 8
    ACCUMULATOR_ROW = 9
    PLACES = 10


def build() -> Path:
    """Build the simulator if its sources changed, and return it; skip the test where it cannot be."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if platform.machine() != "x86_64":
        pytest.skip("the simulator switches stacks in x86-64 assembly")
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler ({compiler[0]})")
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/include'}"]

    def compile_one(source: Path) -> Path:
        """Compile a source unless it, what it includes and the command are those of an object that is there."""
        command = [*compiler, *FLAGS, *include]
        listing = subprocess.run([*command, "-MM", str(source)], check=True, capture_output=True, text=True).stdout
        digest = hashlib.sha256(repr(command).encode())
        for name in listing.replace("\\\n", " ").partition(":")[2].split():
            digest.update(Path(name).read_bytes())
        built = folder / f"{source.stem}-{digest.hexdigest()[:12]}.o"
        if not built.is_file():
            scratch = built.with_suffix(f".{os.getpid()}")
            subprocess.run([*command, "-c", str(source), "-o", str(scratch)], check=True)
            scratch.replace(built)
        return built

    folder = ROOT / "build" / "sim"
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = [str(path) for path in pool.map(compile_one, SOURCES)]
    target = folder / f"simulator-{hashlib.sha256(repr(objects).encode()).hexdigest()[:12]}.so"
    if not target.is_file():
        scratch = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*compiler, *FLAGS, "-shared", *objects, "-o", str(scratch)], check=True)
        scratch.replace(target)
    return target


@functools.cache
def library() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(build()))
    for name in MESSAGES:
        getattr(loaded, f"fxprune_sim_{name}").restype = ctypes.c_char_p
    loaded.fxprune_sim_all_written.restype = ctypes.c_bool
    loaded.fxprune_sim_tile_image_bytes.restype = ctypes.c_int64
    loaded.fxprune_sim_pool_parts.restype = ctypes.c_int64
    loaded.fxprune_sim_dsconv_bytes.restype = ctypes.c_int64
    loaded.fxprune_sim_dsconv_bytes.argtypes = [ctypes.c_int64, ctypes.c_int, ctypes.c_int]
    return loaded


def pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(t.data_ptr() if t is not None else None)


_small = False


@contextlib.contextmanager
def small_gpu() -> Iterator[None]:
    """Give blocks no more shared memory than those of the smallest GPU of compute capability 8 have, 99 KiB."""
    global _small
    _small = True
    try:
        yield
    finally:
        _small = False


def begin(seed: int, plant: Plant, read: Iterable[Tensor | None], write: Iterable[Tensor]) -> None:
    """Start a run: the kernel may read and write these tensors and nothing else."""
    library().fxprune_sim_reset(seed, int(plant), _small)
    for group, writable in ((read, False), (write, True)):
        for t in group:
            if t is not None:
                assert t.is_contiguous()
                library().fxprune_sim_declare(pointer(t), ctypes.c_int64(t.numel() * t.element_size()), writable)


def finish(message: bytes | None, written: Iterable[Tensor] = ()) -> None:
    """Raise what the run reports; ``written`` must have been written whole."""
    if message is not None:
        raise Fault(message.decode())
    for t in written:
        if t.numel() and not library().fxprune_sim_all_written(pointer(t)):
            raise Fault("part of an output was never written")


def longs(*values: int) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def shifted(t: Tensor, elements: int) -> Tensor:
    """Return a contiguous copy of ``t`` that begins ``elements`` after a 64-byte boundary."""
    room = torch.empty(t.numel() + 64 + elements, dtype=t.dtype)
    start = (-room.data_ptr() % 64) // t.element_size() + elements
    return room[start : start + t.numel()].view(t.shape).copy_(t)


def depthwise_taps(
    x: Tensor, weight: Tensor, taps: Tensor, bias: Tensor | None, kernel: list[int], stride: list[int],
    padding: list[int], dilation: list[int], activation: str = "none", *, seed: int = 0, plant: Plant = Plant.NONE,
) -> Tensor:  # fmt: skip
    """``fxprune::depthwise_taps`` on the simulator."""
    window = (kernel, stride, padding, dilation)
    return _depthwise(x, weight, taps, bias, window, activation, False, seed, plant)[0]


def depthwise_pool(
    x: Tensor, weight: Tensor, taps: Tensor, bias: Tensor | None, kernel: list[int], stride: list[int],
    padding: list[int], dilation: list[int], activation: str = "none", *, seed: int = 0, plant: Plant = Plant.NONE,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``fxprune::depthwise_pool`` on the simulator."""
    window = (kernel, stride, padding, dilation)
    return _depthwise(x, weight, taps, bias, window, activation, True, seed, plant)


def _depthwise(
    x: Tensor, weight: Tensor, taps: Tensor, bias: Tensor | None, window: tuple[list[int], ...], activation: str, pool: bool,
    seed: int, plant: Plant,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kernel, stride, padding, dilation = window
    size = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    out = shifted(torch.full((x.shape[0], x.shape[1], *size), float("nan"), dtype=x.dtype), 0)
    numbers = [*x.shape, *size, taps.shape[1], *kernel, *stride, *padding, *dilation, NAMES.index(activation)]
    geometry = longs(*numbers)
    parts = library().fxprune_sim_pool_parts(geometry)
    sums, mean = torch.full((*x.shape[:2], parts), float("nan")), torch.full(x.shape[:2], float("nan"), dtype=x.dtype)
    pooled = [sums, mean] if pool else [None, None]
    begin(seed, plant, (x, weight, taps, bias), (out, *(t for t in pooled if t is not None)))
    operands = [pointer(t) for t in (x, weight, taps, bias, out, *pooled)]
    written = (out, sums, mean) if pool else (out,)
    finish(library().fxprune_sim_depthwise(TYPES[x.dtype], *operands, geometry), written)
    return out, mean


def depthwise_gradient(
    grad: Tensor, given: Tensor, taps: Tensor, size: tuple[int, int], window: tuple[list[int], ...], *, seed: int = 0,
    plant: Plant = Plant.NONE,
) -> Tensor:  # fmt: skip
    """The gradient of the input of size (H, W) (given: the weight) or of the weight (given: x) on the simulator."""
    of_input = given.dim() == 2
    shape = (*grad.shape[:2], *size) if of_input else (grad.shape[1], window[0][0] * window[0][1])
    out = shifted(torch.full(shape, float("nan"), dtype=grad.dtype), 0)
    geometry = longs(*grad.shape[:2], *size, *grad.shape[2:], taps.shape[1], *(v for pair in window for v in pair), 0)
    begin(seed, plant, (grad, given, taps), (out,))
    operands = [pointer(t) for t in ((grad, given) if of_input else (given, grad))]
    call = library().fxprune_sim_depthwise_gradient
    finish(call(TYPES[grad.dtype], of_input, *operands, pointer(taps), pointer(out), geometry), (out,))
    return out


def tile_image(values: Tensor, tile_ptr: Tensor, rows: int, granularity: int, kept: int, *, seed: int = 0) -> Tensor:
    """Return the uint8 image of a packed weight; bytes that no kernel reads are 0xEE."""
    shape = longs(len(tile_ptr) - 1, rows, granularity, kept)
    out = shifted(torch.full((library().fxprune_sim_tile_image_bytes(shape),), 0xEE, dtype=torch.uint8), 0)
    begin(seed, Plant.NONE, (values, tile_ptr), (out,))
    finish(library().fxprune_sim_tile_image(pointer(values), pointer(tile_ptr), pointer(out), shape))
    return out


def tile_gemm(
    x: Tensor, values: Tensor, index: Tensor, tile_ptr: Tensor, columns: Tensor, bias: Tensor | None,
    residual: Tensor | None, gate: Tensor | None, n: int, granularity: int, activation: str = "none", *,
    hopper: bool = False, processors: int = 3, seed: int = 0, plant: Plant = Plant.NONE, shift: int = 0,
    halved: bool = False, tf32: bool = False,
) -> Tensor:  # fmt: skip
    """Feature-major ``fxprune::tile_gemm`` on the simulator; x: (B, K, M) -> (B, N, M).

    halved: through mma.sp; tf32: values are rounded to it, and products may be.
    """
    out = shifted(torch.full((x.shape[0], n, x.shape[2]), float("nan"), dtype=x.dtype), shift)
    packed = (values, index, tile_ptr, columns, bias, residual, gate)
    numbers = (NAMES.index(activation), int(hopper), processors, int(halved), int(tf32))
    return _tiles("tile_gemm", x, packed, out, (x.shape[2], x.shape[1], n), granularity, numbers, seed, plant)


def tile_conv(
    x: Tensor, values: Tensor, index: Tensor, tile_ptr: Tensor, columns: Tensor, bias: Tensor | None,
    residual: Tensor | None, n: int, granularity: int, kernel: list[int], stride: list[int], padding: list[int],
    dilation: list[int], groups: int, activation: str = "none", *, hopper: bool = False, processors: int = 3,
    seed: int = 0, plant: Plant = Plant.NONE, tf32: bool = False,
) -> Tensor:  # fmt: skip
    """``fxprune::tile_conv`` on the simulator. tf32: as of :func:`tile_gemm`."""
    size = [(x.shape[2 + i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)]
    out = shifted(torch.full((x.shape[0], n, *size), float("nan"), dtype=x.dtype), 0)
    packed = (values, index, tile_ptr, columns, bias, residual, None)
    k = x.shape[1] // groups * kernel[0] * kernel[1]
    window = (x.shape[1], groups, *x.shape[2:], size[1], *kernel, *stride, *padding, *dilation)
    numbers = (NAMES.index(activation), *window, int(hopper), processors, int(tf32))
    return _tiles("tile_conv", x, packed, out, (size[0] * size[1], k, n), granularity, numbers, seed, plant)


def _tiles(
    name: str, x: Tensor, packed: tuple[Tensor | None, ...], out: Tensor, shape: tuple[int, int, int], granularity: int,
    numbers: tuple[int, ...], seed: int, plant: Plant,
) -> Tensor:  # fmt: skip
    """Run a kernel on a tile-packed weight.

    packed: values, index, tile_ptr, columns, bias, residual, gate; shape: M, K, N.
    """
    values, index, tile_ptr, columns = packed[:4]
    assert values is not None and index is not None and tile_ptr is not None and columns is not None
    granularity, image = min(granularity, max(len(columns), 1)), None  # as the operator does
    if name == "tile_gemm" and numbers[3]:
        image = cuda_nm_image.build(values, tile_ptr, granularity, len(columns))
        assert image is not None, "more than two in four are kept"
        image = shifted(image, 0)  # 16-byte copies begin there
    elif x.dtype != torch.float32:
        image = tile_image(values, tile_ptr, len(index), granularity, len(columns))
    read = (x, values, image, *packed[1:])
    begin(seed, plant, read, (out,))
    sizes = (x.shape[0], *shape, len(columns), len(index), granularity, len(tile_ptr) - 1)
    tensors = (ctypes.c_void_p * 10)(*[pointer(t) for t in (*read, out)])
    call = getattr(library(), f"fxprune_sim_{name}")
    finish(call(TYPES[x.dtype], tensors, longs(*sizes, *numbers)), (out,))
    return out


def tile_gradient(
    grad: Tensor, given: Tensor, index: Tensor, tile_ptr: Tensor, columns: Tensor, granularity: int, shape: tuple[int, ...],
    window: tuple[list[int], ...] = (), groups: int = 0, *, of_input: bool, seed: int = 0, plant: Plant = Plant.NONE,
    shift: int = 0,
) -> Tensor:  # fmt: skip
    """The gradient of the input or of the packed weight on the simulator; grad: (B, N, *).

    given: the packed values, or x. shape: of x, (B, K, M) or (B, C, H, W) under a window. The weight's gradient has as
    many elements as the tiles.
    """
    tiles, dtype = len(tile_ptr) - 1, grad.dtype
    widths = [min(granularity, len(columns) - t * granularity) for t in range(tiles)]
    nnz = sum(int(tile_ptr[t + 1] - tile_ptr[t]) * widths[t] for t in range(tiles))
    k = shape[1] // max(groups, 1) * (window[0][0] * window[0][1] if window else 1)
    numbers = [grad.shape[0], grad[0, 0].numel(), k, grad.shape[1], len(columns), len(index), granularity, tiles, nnz]
    numbers += [shape[1], groups, *shape[2:], grad.shape[3], *(v for pair in window for v in pair)] if window else [0] * 13
    sizes, room = longs(*numbers), longs(0, 0)
    library().fxprune_sim_tile_gradient_room(TYPES[dtype], of_input, sizes, room)
    out = shifted(torch.full(shape if of_input else (nnz,), float("nan"), dtype=dtype), shift)
    image = None
    if of_input and dtype != torch.float32:
        image = tile_image(given, tile_ptr, len(index), granularity, len(columns))
    first = torch.full((room[0],), -9, dtype=torch.int32)
    second = torch.full((room[1],) if of_input else (room[1] if room[1] > 1 else 0, nnz), -9).to(
        torch.int32 if of_input else torch.float32
    )
    read = (grad, given, image, index, tile_ptr, columns)
    begin(seed, plant, read, (out, first, second))
    tensors = (ctypes.c_void_p * 7)(*[pointer(t) for t in (*read, out)])
    call = library().fxprune_sim_tile_gradient
    room_parts = ctypes.c_int64(room[1])
    finish(call(TYPES[dtype], of_input, tensors, pointer(first), pointer(second), room_parts, sizes), (out,))
    return out


def transpose(x: Tensor, *, seed: int = 0, plant: Plant = Plant.NONE) -> Tensor:
    """x: (R, C) -> (C, R)."""
    out = torch.empty(x.shape[1], x.shape[0], dtype=x.dtype)
    begin(seed, plant, (x,), (out,))
    size = [ctypes.c_int64(v) for v in x.shape]
    finish(library().fxprune_sim_transpose(x.element_size(), pointer(x), pointer(out), *size), (out,))
    return out


def tile_pack(
    given: Tensor, index: Tensor, tile_ptr: Tensor, columns: Tensor, granularity: int, result: int | tuple[int, int]
) -> Tensor:
    """``fxprune::tile_pack``, where ``result`` is the number of values, or ``tile_unpack``, where it is (N, K)."""
    unpack = isinstance(result, tuple)
    out = torch.zeros(result, dtype=given.dtype)
    k = result[1] if isinstance(result, tuple) else given.shape[1]
    begin(0, Plant.NONE, (given, index, tile_ptr, columns), (out,))
    sizes = longs(k, len(columns), granularity, len(tile_ptr) - 1, len(index))
    tensors = [pointer(t) for t in (given, out, index, tile_ptr, columns)]
    finish(library().fxprune_sim_tile_pack(given.element_size(), unpack, *tensors, sizes), () if unpack else (out,))
    return out


def nm_prune(
    grad: Tensor, key: Tensor, n: int, m: int, groups: int, function: str, layer: int, *, row_major: bool, seed: int = 0,
    plant: Plant = Plant.NONE,
) -> Tensor:  # fmt: skip
    """``fxprune::nm_prune`` on the simulator; grad: (B, C, S), or (B, S, C) when ``row_major``."""
    out = shifted(torch.empty_like(grad), 0)
    batch, channels, positions = (grad.shape[0], *((grad.shape[2], grad.shape[1]) if row_major else grad.shape[1:]))
    factors = torch.empty(batch, channels)
    begin(seed, plant, (grad, key), (out, factors))
    sizes = longs(len(key), layer, FUNCTIONS.index(function), row_major, batch, channels, positions, groups, n, m)
    operands = [pointer(t) for t in (grad, key, factors, out)]
    finish(library().fxprune_sim_nm_prune(TYPES[grad.dtype], *operands, sizes), (out,))
    return out


def nm_gemm(
    x: Tensor, weight: Tensor, *, seed: int = 0, plant: Plant = Plant.NONE, shift: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """``fxprune::nm_mm`` on the simulator; x: (R, K), weight: (K, N), 16 bits.

    Returns the product, the kept elements (R, K rounded up to 64, / 2), and their places as the kernel reads them.
    """
    sizes, room = longs(x.shape[0], *weight.shape), longs(0, 0)
    library().fxprune_sim_nm_gemm_room(sizes, room)
    out = shifted(torch.full((x.shape[0], weight.shape[1]), float("nan"), dtype=x.dtype), shift)
    packed = shifted(torch.full((x.shape[0], room[0] // max(x.shape[0], 1)), float("nan"), dtype=x.dtype), 0)
    places = shifted(torch.full((room[1],), -1, dtype=torch.int16), 0)
    begin(seed, plant, (x, weight), (out, packed, places))
    operands = [pointer(t) for t in (x, weight, out, packed, places)]
    finish(library().fxprune_sim_nm_gemm(TYPES[x.dtype], *operands, sizes), (out, packed, places))
    return out, packed, places


def dsconv(
    x: Tensor, weight: Tensor, taps: Tensor, depthwise_bias: Tensor | None, values: Tensor, index: Tensor, tile_ptr: Tensor,
    columns: Tensor, bias: Tensor | None, residual: Tensor | None, kernel: int, stride: int, n: int, granularity: int,
    depthwise_activation: str = "none", activation: str = "none", *, seed: int = 0, plant: Plant = Plant.NONE,
) -> Tensor:  # fmt: skip
    """``fxprune::dsconv`` on the simulator, padding kernel // 2; x: (B, C, H, W) in 16 bits."""
    size = [(s - 1) // stride + 1 for s in x.shape[2:]]
    out = shifted(torch.full((x.shape[0], n, *size), float("nan"), dtype=x.dtype), 0)
    image = tile_image(values, tile_ptr, len(index), granularity, len(columns))
    read = (x, weight, taps, depthwise_bias, image, index, tile_ptr, columns, bias, residual)
    begin(seed, plant, read, (out,))
    counts = (n, len(columns), len(index), granularity, len(tile_ptr) - 1, NAMES.index(activation))
    sizes = longs(*x.shape, *size, kernel, stride, NAMES.index(depthwise_activation), *counts)
    tensors = (ctypes.c_void_p * 11)(*[pointer(t) for t in (*read, out)])
    finish(library().fxprune_sim_dsconv(TYPES[x.dtype], tensors, sizes), (out,))
    return out
