"""Times fxprune::nm_prune against a copy of the same tensor: one read and one write is all that n:m pruning needs.

    python benchmarks/bench_nm_prune.py [--filter REGEX] [--threads N] [--seconds S] [--quantile Q] [--json FILE]

Calls are interleaved; the median of each is reported. GB/s counts the tensor twice, read and written; "copy" is the share
of the rate of ``clone()``, which allocates its result as the operator does. Without --filter the rows are written to
benchmarks/results/<machine>/nm_prune.json, unless --json names another file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from machine import RESULTS, machine
from op_timing import arguments, measure, write
from torch import Tensor

LAYERS = {  # gradients of ResNet-18's convolutions at batch 8, and of a transformer's linear layers
    "8x64x56x56": (8, 64, 56, 56),
    "8x256x14x14": (8, 256, 14, 14),
    "2048x768": (2048, 768),
    "2048x3072": (2048, 3072),
}
RATIOS = ((2, 4), (1, 4), (4, 8), (2, 8), (1, 16), (4, 16), (4, 32), (16, 32))
FUNCTIONS = ("magnitude", "random", "group_rescaled_magnitude", "rescaled_magnitude", "mvue")


@dataclass
class Row:
    name: str
    us: float
    gb_s: float
    copy_us: float
    copy: float


def cases() -> Iterator[tuple[str, Tensor, int, int, int, str]]:
    for name, shape in LAYERS.items():
        grad = torch.randn(shape)
        formats = {"": grad}
        if len(shape) == 4:
            formats = {" nchw": grad, " nhwc": grad.contiguous(memory_format=torch.channels_last)}
        for suffix, tensor in formats.items():
            dim = 1 if len(shape) == 4 else -1
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                label = f"{name}{suffix} {str(dtype).removeprefix('torch.')}"
                typed = tensor.to(dtype)
                yield f"{label} 2:4 magnitude", typed, 2, 4, dim, "magnitude"
                if dtype == torch.float32:
                    for n, m in RATIOS[1:]:
                        yield f"{label} {n}:{m} magnitude", typed, n, m, dim, "magnitude"
                    for function in FUNCTIONS[1:]:
                        yield f"{label} 2:4 {function}", typed, 2, 4, dim, function


def main() -> None:
    options = arguments(__doc__, 0.3, "pruned gradients")
    if not options.filter:
        options.json = options.json or str(RESULTS / machine()["slug"] / "nm_prune.json")
    print(f"{'case':52} {'us':>9} {'GB/s':>7} {'copy us':>9} {'copy':>6}")
    key, rows = torch.tensor([1, 2, 3]), []
    with torch.inference_mode():
        for name, grad, n, m, dim, function in cases():
            if not re.search(options.filter, name):
                continue
            args = (grad, key, n, m, dim, 1, function, 0)
            calls = {"ours": lambda args=args: torch.ops.fxprune.nm_prune(*args), "copy": grad.clone}
            times = measure(calls, options.seconds, options.quantile)
            row = Row(
                name=name,
                us=times["ours"],
                gb_s=2 * grad.numel() * grad.element_size() / times["ours"] * 1e-3,
                copy_us=times["copy"],
                copy=times["copy"] / times["ours"],
            )
            rows.append(row)
            print(f"{row.name:52} {row.us:9.1f} {row.gb_s:7.1f} {row.copy_us:9.1f} {row.copy:6.0%}", flush=True)
    write(options, rows)


if __name__ == "__main__":
    main()
