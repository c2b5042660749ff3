"""What the papers report, measured again here: DEPrune's Tables 2 and 3, TW's GEMM and transpose tables, TW's ranking.

    python benchmarks/bench_paper.py [--only NAME ...]

Weights are random, so ratios and times are compared, never accuracy. The JSON goes to
benchmarks/results/<machine>/paper.json; benchmarks/render_paper.py writes docs/paper-comparison.md from it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from machine import RESULTS, machine, origin, own_environment

Run = Callable[[], Any]
# model -> sparsity of the depthwise layers in DEPrune's Tables 2 and 3
DEPTHWISE = {"mobilenetv2_100": 0.78, "mobilenetv3_small_100": 0.82, "efficientnet_b0": 0.85}
# channels and taps of every depthwise layer
WIDTHS = {
    "mobilenetv2_100": [(c, 9) for c in (32, 96, *[144] * 2, *[192] * 3, *[384] * 4, *[576] * 3, *[960] * 3)],
    "mobilenetv3_small_100": [(16, 9), (72, 9), (88, 9), *[(c, 25) for c in (96, 240, 240, 120, 144, 288, 576, 576)]],
    "efficientnet_b0": [
        *[(c, 9) for c in (32, 96, 144)],
        *[(c, 25) for c in (144, 240)],
        *[(c, 9) for c in (240, 480, 480)],
        *[(c, 25) for c in (480, 672, 672, 672, 1152, 1152, 1152)],
        (1152, 9),
    ],
}
BATCH = 32
VARIANTS = {"dcp": (False, "off"), "dcp-b": (True, "off"), "dcp-bh": (True, "deprune")}
BERT_LAYER = ((768, 768, 4), (768, 3072, 1), (3072, 768, 1))  # K, N, how many
LAYERS = 12
SHAPES = {
    "BERT layer: 4x 768x768, 3072x768, 768x3072": [(768, 768)] * 4 + [(3072, 768), (768, 3072)],
    "convolutions: 64x27 .. 256x1152": [(64, 27), (64, 576), (128, 576), (128, 1152), (256, 1152)],
    "equal: 4x 768x768": [(768, 768)] * 4,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds of each timing")
    args = parser.parse_args(argv)
    own_environment()
    import torch

    torch.set_num_threads(2)
    path = RESULTS / machine()["slug"] / "paper.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    for name in args.only:
        record[name] = []
        for row in SECTIONS[name](args.rounds):
            record[name].append(row)
            print(name, row, flush=True)
    record.update(**origin(), threads=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def depthwise(rounds: int) -> Iterator[dict[str, Any]]:
    """Sparsity, lowest group, HSR's pattern and the summed time of all depthwise layers, by model and variant."""
    import torch
    import zoo
    from fxprune.lowering.kernels import KernelTables
    from fxprune.lowering.measure import dense_calls, sparse_call

    from fxprune.capture import capture, detect
    from fxprune.config import Config
    from fxprune.sparsity import dcp

    unit = KernelTables().unit("depthwise")
    for name, wanted in DEPTHWISE.items():
        model, inputs = zoo.build(name)
        ctx = detect(capture(model, inputs(BATCH))[0], Config())
        layers = {m.parameter: m for m in ctx.matches if m.kind == "depthwise"}
        scores = {n: m.matrix(m.value.detach()).abs() for n, m in layers.items()}
        plans = {}
        for variant, (balance, recalibration) in VARIANTS.items():
            gain = (lambda n, kept, floor: float(kept - floor)) if recalibration == "deprune" else None
            asked = dict.fromkeys(scores, wanted)
            plans[variant] = dcp.plan_layers(scores, asked, balance=balance, recalibration=recalibration, gain=gain)
        total = dict.fromkeys((*VARIANTS, "dense"), 0.0)
        for parameter, match in layers.items():
            x = torch.randn([int(s) for s in match.geometry.x])
            ours = [sparse_call(match, plan[parameter], unit, x) for plan in plans.values()]
            with torch.inference_mode():
                times = fastest([*ours, *dense_calls(match, x)], rounds)
            for key, us in zip(total, (*times[: len(ours)], min(times[len(ours) :])), strict=True):
                total[key] += us
        size = sum(s.numel() for s in scores.values())
        for variant, masks in plans.items():
            yield {
                "model": name,
                "variant": variant,
                "asked": wanted,
                "sparsity": round(1 - sum(int(m.mask.sum()) for m in masks.values()) / size, 4),
                "lowest group": round(min(lowest(m) for m in masks.values()), 3),
                "pattern": next((m.note.partition(":")[0] for m in masks.values() if m.note), ""),
                "us": round(total[variant], 1),
                "dense us": round(total["dense"], 1),
            }


def lowest(layer: Any) -> float:
    """Return the smallest sparsity among a layer's full groups."""
    tiling = layer.tiling
    groups = [t for t in range(tiling.tiles) if len(tiling.members(t)) == tiling.granularity] or range(tiling.tiles)
    return min(1 - layer.counts[t] / (len(tiling.members(t)) * tiling.shape[1]) for t in groups)


def transposes(rounds: int) -> Iterator[dict[str, Any]]:
    """All linear layers of BERT base at 75 %, each alone: dense; row-major; feature-major, with and without transposes."""
    import torch

    for tokens in (128, 1024):
        sums: dict[str, float] = {}
        for k, n, count in BERT_LAYER:
            dense, ours = layouts(tokens, k, n)
            with torch.inference_mode():
                times = fastest([*dense, *ours.values()], rounds)
            best = {"dense": min(times[: len(dense)]), **dict(zip(ours, times[len(dense) :], strict=True))}
            for name, us in best.items():
                sums[name] = sums.get(name, 0.0) + us * count * LAYERS / 1e3
        yield {"tokens": tokens, **{f"{name} ms": round(ms, 2) for name, ms in sums.items()}}


def layouts(tokens: int, k: int, n: int) -> tuple[list[Run], dict[str, Run]]:
    """Dense calls of one linear layer, and ours by layout: half of the output features go, and half of each tile's rows."""
    import torch
    from bench_ops import dense_linear, structure

    gen = torch.Generator().manual_seed(0)
    packs = {}
    for granularity in (64, 8):
        _, *packed = structure(n // 2, k, granularity, 0.5, gen)
        packed[-1] = torch.arange(0, n, 2).int()
        packs[granularity] = packed
    weight, x = torch.randn(n, k, generator=gen), torch.randn(tokens, k, generator=gen)
    across = x.t().contiguous()[None]
    return [*dense_linear(x, weight).values()], {
        "row-major": tile_call(x, packs[64], n, 64),
        "feature-major": tile_call(across, packs[8], n, 8, 1),
        "feature-major + transposes": lambda: tile_call(x.t().contiguous()[None], packs[8], n, 8, 1)()[0].t().contiguous(),
    }


def gemms(rounds: int) -> Iterator[dict[str, Any]]:
    """TW's own micro-benchmark (M, K, N; columns and rows lose the same share) and where it breaks even."""
    import torch

    for m, k, n in ((12800, 768, 768), (12800, 768, 3072), (12800, 3072, 768), (128, 768, 768), (128, 768, 3072)):
        for granularity in (64, 128):
            shares = (0.0, 0.25, 0.5, 0.75) if m < 1000 else (0.75,)
            dense, ours = shrunk(m, k, n, granularity, shares)
            with torch.inference_mode():
                times = fastest([*dense, *ours], rounds if m < 1000 else 3)
            best = min(times[: len(dense)])
            ratios = {f"{share:.0%}": round(best / us, 2) for share, us in zip(shares, times[len(dense) :], strict=True)}
            yield {"M": m, "K": k, "N": n, "G": granularity, "dense us": round(best, 1), "speed-up": ratios}


def shrunk(m: int, k: int, n: int, granularity: int, shares: tuple[float, ...]) -> tuple[list[Run], list[Run]]:
    """Return the dense calls, and ours per share of zeros."""
    import torch
    from bench_ops import dense_linear, structure

    gen = torch.Generator().manual_seed(0)
    x, runs = torch.randn(m, k), []
    for share in shares:
        left = (1 - share) ** 0.5
        kept = round(n * left / granularity) * granularity
        _, *packed = structure(kept, k, granularity, 1 - left, gen)
        packed[-1] = torch.randperm(n, generator=gen)[:kept].sort().values.int()
        runs.append(tile_call(x, packed, n, granularity))
    return [*dense_linear(x, torch.randn(n, k)).values()], runs


def tile_call(x: Any, packed: Any, n: int, granularity: int, feature_dim: int = -1) -> Run:
    import torch

    return lambda: torch.ops.fxprune.tile_gemm(x, *packed, None, None, None, n, granularity, feature_dim, "none")


def ranking(rounds: int) -> Iterator[dict[str, Any]]:
    """The sparsity that TW's published ranking and the corrected one reach on independent random scores."""
    import torch

    from fxprune.sparsity import tile

    for name, shapes in SHAPES.items():
        gen = torch.Generator().manual_seed(0)
        scores = {f"layer{i}": torch.rand(s, generator=gen) for i, s in enumerate(shapes)}
        for wanted in (0.5, 0.75, 0.9):
            row: dict[str, Any] = {"layers": name, "asked": wanted}
            for rule in ("published", "corrected"):
                masks = tile.plan_layers(scores, dict.fromkeys(scores, wanted), scope="global", ranking=rule, granularity=64)
                kept = sum(int(m.mask.sum()) for m in masks.values())
                row[rule] = round(1 - kept / sum(s.numel() for s in scores.values()), 4)
                row[f"{rule} deletes"] = sum(not m.mask.any() for m in masks.values())
            yield row


def fastest(runs: list[Run], rounds: int) -> list[float]:
    """Return the fastest call of each in microseconds, interleaved."""
    from fxprune.lowering.measure import interleave

    return interleave(runs, rounds)[0]


def hsr(rounds: int) -> Iterator[dict[str, Any]]:
    """HSR's published rule on balanced masks of one sparsity per layer, tile 32: its pattern and what it reaches."""
    from fxprune.sparsity.recalibrate import Kept, recalibrate_counts

    for name, wanted in DEPTHWISE.items():
        layers = {}
        for layer, (channels, taps) in enumerate(WIDTHS[name]):
            sizes = tuple(min(32, channels - c) * taps for c in range(0, channels, 32))
            layers[str(layer)] = Kept(tuple(s - round(wanted * s) for s in sizes), sizes)
        result = recalibrate_counts(layers, 32, lambda n, kept, floor: float(kept - floor))
        yield {"model": name, "asked": wanted, "pattern": result.pattern, "sparsity": round(result.sparsity, 4)}


SECTIONS: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
    "depthwise": depthwise,
    "hsr": hsr,
    "transposes": transposes,
    "gemms": gemms,
    "ranking": ranking,
}


if __name__ == "__main__":
    sys.exit(main())
