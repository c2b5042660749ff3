"""Times the CUDA operators and compiled models against the best of their rivals, beside what was predicted.

    python benchmarks/bench_gpu.py [--seconds 200] [--only ceilings,depthwise,gemm,models] [--out FILE]

Results go to benchmarks/results/<gpu>/<date>-<commit>.json: ceilings first (copy, matmul, an empty kernel), then the
operators with their share of those ceilings, then models. Predictions are floors from the roofline (docs/cuda.md), written
before anything was timed. Ends with status 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from fxprune.lowering import library
from gpu_fusions import fusion_rows
from gpu_timing import Rivals, Row, micros, row, share
from torch import Tensor

from fxprune.ops import cuda_nm_image as nm_image
from fxprune.ops import cuda_tile_image as tile_image

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda"  # a dry run (tests/cuda/test_gpu_suite.py) sets another
# the share of the time that a section may take: what one leaves, and all of it in the end, is the models'
SECTIONS = {"ceilings": 0.1, "depthwise": 0.15, "gemm": 0.2, "fusions": 0.15, "models": 1.0}
# Speed-ups over dense predicted from the roofline, by (layer, kept share): whole-model floors at batch 32 at 80 % of the
# tensor cores' rate for GEMMs, instruction counts for depthwise.
PREDICTED_GEMM = {0.5: 1.46, 0.3: 2.06}
# whole models over fused dense kernels at batch 32 and 256: what pruning alone moves the floor by
PREDICTED_MODEL = {
    "mobilenetv2_100": {0.5: 1.01, 0.7: 1.01}, "efficientnet_b0": {0.5: 1.02, 0.7: 1.02},
    "convnext_tiny": {0.5: 1.22, 0.7: 1.30}, "convnext_base": {0.5: 1.37, 0.7: 1.59}, "bert_base": {0.5: 1.46, 0.7: 2.06},
}  # fmt: skip
# microseconds of whole models under a graph by (batch): floors of fused dense kernels, and of ours at 50 % in fused blocks
# (EfficientNet: pairs); a real set of kernels lands at 1.3 to 2 times as much
PREDICTED_FLOORS = {
    "mobilenetv2_100": {1: (119, 46), 32: (230, 65), 256: (1643, 372)},
    "efficientnet_b0": {1: (218, 147), 32: (347, 263), 256: (2033, 1686)},
    "convnext_tiny": {1: (183, 64), 32: (702, 272), 256: (5541, 2129)},
    "convnext_base": {1: (341, 103), 32: (1805, 823), 256: (14379, 6538)},
    "bert_base": {1: (185, 158), 32: (1021, 699), 256: (8170, 5583)},
}
# what is to be reached at 50 %, by (model, batch): a speed-up over the best rival, or microseconds
TARGETS = {
    ("mobilenetv2_100", 1): {"us": 120}, ("mobilenetv2_100", 256): {"speedup": 1.5},
    ("convnext_base", 32): {"speedup": 1.4}, ("bert_base", 32): {"speedup": 1.4},
}  # fmt: skip
PREDICTED_DEPTHWISE = {(7, 0.3): 2.0, (7, 0.5): 1.6, (5, 0.3): 1.17, (5, 0.5): 1.17, (3, 0.3): 1.0, (3, 0.5): 1.0}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=200.0, help="sections that do not fit any more are left out")
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--out", help="the file to write; by default in benchmarks/results/")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu: nothing was timed: torch finds no GPU")
        return 2
    if (reason := library.cuda_missing()) is not None:
        print(f"bench_gpu: nothing was timed: {reason}")
        return 2
    end = time.monotonic() + options.seconds
    report: dict[str, Any] = {**machine(), "left_out": []}
    ceilings = measure_ceilings()
    report["ceilings"] = ceilings
    print(json.dumps(ceilings))
    sections: dict[str, Callable[[], Iterator[Row]]] = {
        "depthwise": lambda: depthwise_rows(ceilings),
        "gemm": lambda: gemm_rows(ceilings),
        "fusions": lambda: fusion_rows(ceilings),
        "models": model_rows,
    }
    with torch.no_grad():
        for name, rows in sections.items():
            if name not in options.only.split(","):
                continue
            report[name], report["under_way"] = [], name  # stays in the file of a run that is stopped
            last = time.monotonic()
            stop = min(end, last + SECTIONS[name] * options.seconds)
            for row in rows():
                report[name].append(row)
                print(json.dumps(row), flush=True)
                write(report, options.out)
                now, before = time.monotonic(), last
                last = now
                if now + (now - before) > stop:  # the next row may take as long
                    report["left_out"].append(f"the rest of {name}: no time left")
                    break
    report.pop("under_way", None)
    print(f"bench_gpu: wrote {write(report, options.out)}")
    return 0


def machine() -> dict[str, Any]:
    """Return the card, its clocks, and the versions of everything."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    try:
        smi = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        smi = ""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "processors": properties.multi_processor_count,
        "driver, clocks, power": smi,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "commit": git("rev-parse", "--short", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }


def git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def write(report: dict[str, Any], out: str | None) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", report["gpu"].lower()).strip("-")
    path = Path(out) if out else ROOT / "benchmarks/results" / slug / f"{report['date']}-{report['commit']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def measure_ceilings() -> dict[str, float]:
    """Return copy in TB/s (read and written), matmul in TFLOP/s, and the microseconds of an empty kernel in a graph."""
    big = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    other, tiny = torch.empty_like(big), torch.zeros(1, device=DEVICE)
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    calls = {"copy": lambda: other.copy_(big), "matmul": lambda: a @ b, "launch": lambda: tiny.add_(1)}
    times = {name.partition(" ")[0]: us for name, us in micros(calls).items()}
    copy, matmul = 2 * big.numel() / times["copy"] * 1e-6, 2 * 8192**3 / times["matmul"] * 1e-6
    return {"copy_tb_s": round(copy, 3), "matmul_tflop_s": round(matmul, 1), "launch_us": round(times["launch"], 2)}


def depthwise_rows(ceilings: dict[str, float]) -> Iterator[Row]:
    layers = (  # batch, channels, side, kernel, stride
        (32, 96, 56, 7, 1), (32, 384, 14, 7, 1), (32, 144, 56, 3, 1), (32, 384, 14, 3, 1), (32, 96, 112, 3, 2),
        (32, 240, 28, 5, 1), (32, 672, 14, 5, 1), (1, 96, 56, 7, 1), (1, 144, 56, 3, 1),
    )  # fmt: skip
    for dtype in (torch.bfloat16, torch.float16):
        for b, c, side, k, stride in layers:
            for keep in (1.0, 0.5, 0.3):
                yield depthwise_row(b, c, side, k, stride, keep, dtype, ceilings)


def depthwise_row(
    b: int, c: int, side: int, k: int, stride: int, keep: float, dtype: torch.dtype, ceilings: dict[str, float]
) -> Row:
    gen = torch.Generator().manual_seed(0)
    taps = max(1, round(k * k * keep))
    mask = torch.zeros(c, k * k, dtype=torch.bool)
    words = torch.zeros(c, 1, dtype=torch.int64)
    for channel in range(c):
        mask[channel, torch.randperm(k * k, generator=gen)[:taps]] = True
    for tap in range(k * k):
        words[:, 0] |= mask[:, tap].long() << tap
    weight = (torch.randn(c, k * k, generator=gen) * mask).to(DEVICE, dtype)
    x, words = torch.randn(b, c, side, side, device=DEVICE).to(dtype), words.to(DEVICE)
    bias, dense, pad = torch.zeros(c, device=DEVICE, dtype=dtype), weight.view(c, 1, k, k), k // 2
    last, dense_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, dense))
    window = [[k, k], [stride] * 2, [pad] * 2, [1, 1]]
    rivals = Rivals()
    rivals.add("ours", lambda: lambda: torch.ops.fxprune.depthwise_taps(x, weight, words, bias, *window, "none"))
    for layout, given, kernel in (("nchw", x, dense), ("nhwc", last, dense_last)):
        call = conv_call(given, kernel, bias, stride, pad, c)
        for choice in ("cudnn", "native", None):
            rivals.add(f"{layout} {choice or 'default'}", lambda call=call, choice=choice: with_kernel(call, choice))
    out = (side + 2 * pad - k) // stride + 1
    moved = (x.numel() + b * c * out * out) * x.element_size()
    name = f"depthwise b{b} {c}@{side} k{k}s{stride} keep {keep:.0%} {str(dtype)[6:]}"
    return row(
        name,
        rivals,
        PREDICTED_DEPTHWISE.get((k, keep)),
        copy_share=lambda us: share(moved / us * 1e-6, ceilings["copy_tb_s"]),
    )


def conv_call(x: Tensor, weight: Tensor, bias: Tensor, stride: int, pad: int, groups: int) -> Callable[[], Tensor]:
    return lambda: F.conv2d(x, weight, bias, stride, pad, 1, groups)


def with_kernel(call: Callable[[], Tensor], kernel: str | None) -> Callable[[], Tensor]:
    """Return the call under one of PyTorch's depthwise kernels; torch before 2.13 has no such choice."""
    if kernel is None:
        return call
    torch.backends.cudnn.flags(depthwise_kernel=kernel)  # an error here leaves the rival out

    def run() -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, depthwise_kernel=kernel):
            return call()

    return run


def gemm_rows(ceilings: dict[str, float]) -> Iterator[Row]:
    for dtype in (torch.bfloat16, torch.float16):
        for m, k, n in ((4096, 768, 768), (4096, 768, 3072), (4096, 3072, 768), (128, 768, 3072), (6272, 384, 1536)):
            for keep in (0.5, 0.3):
                for g in (128, 256):
                    yield gemm_row(m, k, n, keep, g, dtype, ceilings)


def gemm_row(m: int, k: int, n: int, keep: float, g: int, dtype: torch.dtype, ceilings: dict[str, float]) -> Row:
    gen = torch.Generator().manual_seed(0)
    kept, tiles = round(k * keep), -(-n // g)
    index = torch.cat([torch.randperm(k, generator=gen)[:kept].sort().values for _ in range(tiles)]).int().to(DEVICE)
    ptr = (torch.arange(tiles + 1) * kept).int().to(DEVICE)
    columns = torch.arange(n).int().to(DEVICE)
    values = torch.randn(kept * n).to(dtype)
    image = values.to(DEVICE) if dtype == torch.float32 else tile_image.build(values, ptr.cpu(), g, n).to(DEVICE)
    x = torch.randn(1, k, m, device=DEVICE).to(dtype)  # feature-major
    rows = x[0].t().contiguous()
    weight = torch.randn(n, k, device=DEVICE).to(dtype)
    packed = (image, index, ptr, columns, None, None, None, n, g)
    rivals = Rivals()
    rivals.add("ours", lambda: lambda: torch.ops.fxprune.tile_gemm(x, *packed, 1, "none"))
    rivals.add("linear", lambda: lambda: F.linear(rows, weight))
    rivals.add("matmul feature-major", lambda: lambda: weight @ x[0])
    rivals.add("cuSPARSELt 2:4", lambda: semi_structured(weight, rows))
    rivals.add("QuACK", lambda: quack(rows, weight))
    rivals.add("QuACK gather", lambda: quack_gather(x, values.to(DEVICE), index, ptr, g))
    rivals.add("grouped_mm", lambda: grouped(rows, index, ptr, weight, g))
    others = Rivals()
    others.add("row-major", lambda: lambda: torch.ops.fxprune.tile_gemm(rows, *packed, -1, "none"))
    if dtype != torch.float32:
        halved = two_in_four(values, ptr.cpu(), g, n)
        others.add("two in four", lambda: lambda: torch.ops.fxprune.tile_gemm(x, halved, *packed[1:], 1, "none"))
    flops = 2.0 * m * values.numel()
    found = row(
        f"gemm m{m} {k}->{n} keep {keep:.0%} g{g} {str(dtype)[6:]}", rivals, PREDICTED_GEMM[keep],
        matmul_share=lambda us: share(flops / us * 1e-6, ceilings["matmul_tflop_s"]),
    )  # fmt: skip
    return {**found, "others_us": {k: round(v, 2) for k, v in micros(others.calls).items()}}


def two_in_four(values: Tensor, ptr: Tensor, g: int, n: int) -> Tensor:
    """Return the image of two in four of the values of whole tiles, for sparse tensor cores: half of the products."""
    halved = values.view(n // g, -1, g).clone()
    halved[:, 2::4], halved[:, 3::4] = 0, 0
    image = nm_image.build(halved.flatten(), ptr, g, n)
    assert image is not None
    return image.to(DEVICE)


def grouped(rows: Tensor, index: Tensor, ptr: Tensor, weight: Tensor, g: int) -> Callable[[], Tensor]:
    """Return the tiles as groups of PyTorch's grouped product, rows of x gathered before."""
    kept = int(ptr[1])
    gathered = torch.stack([rows[:, part.long()] for part in index.split(kept)])
    dense = torch.stack([weight[t * g : (t + 1) * g, :kept] for t in range(len(ptr) - 1)]).transpose(1, 2)
    return lambda: torch._grouped_mm(gathered, dense)


def semi_structured(weight: Tensor, rows: Tensor) -> Callable[[], Tensor]:
    """Return the 2:4 product of PyTorch, where the card and the build have it."""
    mask = torch.tensor([1, 1, 0, 0], device=DEVICE, dtype=weight.dtype).repeat(weight.shape[1] // 4)
    sparse = torch.sparse.to_sparse_semi_structured(weight * mask)
    return lambda: F.linear(rows, sparse)


def quack(rows: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    from quack.gemm_interface import gemm

    transposed = weight.t()
    return lambda: gemm(rows, transposed)


def quack_gather(x: Tensor, values: Tensor, index: Tensor, ptr: Tensor, g: int) -> Callable[[], Tensor]:
    """Return the same tiles as groups of one product along K, whose rows are gathered on the way: (tiles, tokens, G)."""
    from quack.gemm_interface import gemm

    weights, kept = values.view(-1, g), int(ptr[1])

    def call() -> Tensor:
        return gemm(x[0].t(), weights, cu_seqlens_k=ptr, A_idx=index)

    first = x[0][index[:kept].long()].t() @ weights[:kept]
    torch.testing.assert_close(call()[0], first, rtol=2e-2, atol=2e-2 * float(first.abs().max()))
    return call


def model_rows() -> Iterator[Row]:
    """What matters most comes first: each model once before any of them again."""
    for dtype in (torch.bfloat16, torch.float16):
        for batch, sparsity in (
            (32, 0.5),
            (1, 0.5),
            (256, 0.5),
            (32, 0.7),
            (32, 0.0),
            (1, 0.7),
            (256, 0.7),
            (1, 0.0),
            (256, 0.0),
        ):
            for name in PREDICTED_MODEL:
                yield model_row(name, batch, sparsity, dtype)


def model_row(name: str, batch: int, sparsity: float, dtype: torch.dtype) -> Row:
    from zoo import build

    import fxprune

    torch._dynamo.reset()
    rivals = Rivals()
    model, inputs_of = build(name)
    if sparsity:
        model = fxprune.prune(model, inputs_of(1), sparsity=sparsity).model
    inputs = inputs_of(batch)
    model = model.to(DEVICE).to(dtype).eval()
    given = tuple(t.to(DEVICE).to(dtype) if t.is_floating_point() else t.to(DEVICE) for t in inputs)
    channels_last = all(t.dim() == 4 for t in given)
    rivals.add("ours", lambda: compiled(model, given, backend="hwprune", options={"mode": "max-autotune-no-cudagraphs"}))
    rivals.add("eager", lambda: lambda: model(*given))
    rivals.add("inductor", lambda: compiled(model, given, mode="max-autotune-no-cudagraphs"))
    if channels_last:
        last = tuple(t.contiguous(memory_format=torch.channels_last) for t in given)
        rivals.add("eager nhwc", lambda: lambda: model(*last))
        rivals.add("inductor nhwc", lambda: compiled(model, last, mode="max-autotune-no-cudagraphs"))
    found = row(
        f"{name} b{batch} sparsity {sparsity:.0%} {str(dtype)[6:]}", rivals, PREDICTED_MODEL.get(name, {}).get(sparsity)
    )
    dense, ours = PREDICTED_FLOORS.get(name, {}).get(batch, (None, None))
    expected = {"dense_floor_us": dense, "floor_us": ours if sparsity == 0.5 else None}
    return {**found, **expected, "target": TARGETS.get((name, batch)) if sparsity == 0.5 else None}


def compiled(model: torch.nn.Module, given: tuple[Tensor, ...], **how: Any) -> Callable[[], Any]:
    """Return a compiled call; graphs are captured around it here, for all rivals alike.

    Dynamo is reset once for a model's rivals: a reset between them would compile each again when it is timed.
    """
    run = torch.compile(model, dynamic=False, **how)
    run(*given)
    return lambda: run(*given)


if __name__ == "__main__":
    sys.exit(main())
