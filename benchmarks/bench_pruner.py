"""What fxprune.Pruner costs a training loop: time per step, memory, and what resuming or two processes change.

    python benchmarks/bench_pruner.py [--rounds 3] [--every 50] [--threads 1] [--out FILE]

Steps (forward, backward, an optimizer, ``Pruner.step``) of one network are interleaved without a pruner and with one per
importance, in an order that is drawn anew each time. A step is of one of three kinds: one that prunes, one whose gradients
Taylor scores add up, any other. The median of each kind beside the same updates without a pruner (optimizer and pruner:
forward and backward do not change), weighted by how often it comes with a round every so many steps, is the amortised
overhead; here rounds follow each other faster than that.
The result is benchmarks/results/<machine>/pruner.json; benchmarks/render_sdgp.py writes docs/sdgp-results.md from it.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from bench_sdgp import transformer
from machine import RESULTS, machine, origin, own_environment
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxprune

SPARSITY, IMPORTANCES = 0.75, ("magnitude", "taylor")
OPTIMIZERS: dict[str, dict[str, Any]] = {"AdamW": {}, "AdamW, fused": {"fused": True}}
CYCLE, WINDOW = 16, 10  # steps between two rounds here; those of which Taylor scores are the sum
RUN = 12  # steps of the comparisons with a resumed run and with two processes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--rounds", type=int, default=3, help="pruning rounds that are timed")
    parser.add_argument("--every", type=int, default=50, help="steps between two rounds of the loop that is reported")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="the JSON file (default: results/<machine>/pruner.json)")
    args = parser.parse_args(argv)
    own_environment()
    torch.set_num_threads(args.threads)
    record = {
        "threads": args.threads,
        "every": args.every,
        "rows": [row for net in args.nets for name in OPTIMIZERS for row in measured(net, name, args.rounds, args.every)],
        "equality": {"resumed": resumed(), "two processes": two_processes()},
        **origin(),
    }
    path = args.out or RESULTS / machine()["slug"] / "pruner.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def convolutions() -> tuple[nn.Module, Tensor]:
    """Depthwise-separable blocks of 64 to 128 channels, on eight maps of 28 x 28."""
    parts: list[nn.Module] = []
    for i, o in ((64, 64), (64, 128), (128, 128)):
        parts += [nn.Conv2d(i, i, 3, padding=1, groups=i, bias=False), nn.BatchNorm2d(i), nn.ReLU()]
        parts += [nn.Conv2d(i, o, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*parts), torch.randn(8, 64, 28, 28)


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "transformer, 512 tokens": lambda: transformer(256, 4, 2, 8),
    "transformer, 2048 tokens": lambda: transformer(256, 4, 2, 32),
    "convolutions": convolutions,
}


class Loop:
    """One copy of a network in training, with a pruner or without."""

    def __init__(
        self, model: nn.Module, x: Tensor, optimizer: str, pruner: Callable[[nn.Module], fxprune.Pruner] | None
    ) -> None:
        self.model, self.x = copy.deepcopy(model).train(), x
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, **OPTIMIZERS[optimizer])
        self.pruner = None if pruner is None else pruner(self.model)

    def step(self) -> tuple[float, float]:
        """Return the milliseconds of the whole step and of its update, in which everything that a pruner does lies."""
        start = time.perf_counter()
        self.optimizer.zero_grad()
        self.model(self.x).square().mean().backward()
        middle = time.perf_counter()
        self.optimizer.step()
        if self.pruner is not None:
            self.pruner.step()
        end = time.perf_counter()
        return 1e3 * (end - start), 1e3 * (end - middle)


def measured(net: str, optimizer: str, rounds: int, every: int) -> list[dict[str, Any]]:
    """Return a row per importance: milliseconds of a step and of each kind's overhead, and bytes."""
    torch.manual_seed(0)
    model, x = NETS[net]()
    schedule = fxprune.CubicSchedule(0, rounds * CYCLE, CYCLE)

    def pruner(importance: str) -> Callable[[nn.Module], fxprune.Pruner]:
        return lambda m: fxprune.Pruner(m, x, sparsity=SPARSITY, schedule=schedule, importance=importance, window=WINDOW)

    loops = {"none": Loop(model, x, optimizer, None)}
    loops |= {name: Loop(model, x, optimizer, pruner(name)) for name in IMPORTANCES}
    times: dict[str, list[float]] = {name: [] for name in loops}  # of updates
    steps = []
    draw = random.Random(0)
    for _ in range(rounds * CYCLE):
        for name in draw.sample(list(loops), len(loops)):
            step, update = loops[name].step()
            times[name].append(update)
            if name == "none":
                steps.append(step)
    rows = []
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for name in IMPORTANCES:
        costs = overheads(times["none"], times[name], every)
        amortised = sum(ms * count for ms, count in costs.values()) / every
        plain = statistics.median(steps)
        row = {
            "net": net,
            "optimizer": optimizer,
            "importance": name,
            "step ms": round(plain, 3),
            **{kind: round(ms, 3) for kind, (ms, _) in costs.items()},
            "overhead": round(amortised / plain, 5),
            "bytes": bytes_of(net, optimizer, name),
            "weights": weights,
        }
        print(row, flush=True)
        rows.append(row)
    return rows


def overheads(plain: list[float], pruned: list[float], every: int) -> dict[str, tuple[float, int]]:
    """Return by kind of step the median milliseconds more, and how many of ``every`` steps are of it."""
    kinds: dict[str, list[float]] = {"other ms": [], "window ms": [], "round ms": []}
    for i, (without, with_) in enumerate(zip(plain, pruned, strict=True), start=1):
        ahead = -i % CYCLE
        kind = "round ms" if ahead == 0 else "window ms" if ahead < WINDOW else "other ms"
        if i > 3:  # the first steps make the optimizer's state
            kinds[kind].append(with_ - without)
    counts = {"other ms": every - WINDOW, "window ms": WINDOW - 1, "round ms": 1}
    return {kind: (statistics.median(more), counts[kind]) for kind, more in kinds.items()}


def bytes_of(net: str, optimizer: str, importance: str) -> int:
    """Return the bytes that a pruner's tensors take after its first round, with Taylor scores of nearly a window."""
    model, x = NETS[net]()
    loop = Loop(model, x, optimizer, None)
    for _ in range(3):  # gradients and moments are there
        loop.step()
    before = live_bytes()
    schedule = fxprune.CubicSchedule(0, 2 * WINDOW, WINDOW)
    loop.pruner = fxprune.Pruner(loop.model, x, sparsity=SPARSITY, schedule=schedule, importance=importance)
    for _ in range(2 * WINDOW - 1):
        loop.step()
    return live_bytes() - before


def live_bytes() -> int:
    """Return the bytes of all storages that a tensor of this process has."""
    gc.collect()
    found = [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}.values())


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 8))


def small_loop() -> tuple[nn.Module, torch.optim.Optimizer, fxprune.Pruner]:
    model = small()
    schedule = fxprune.CubicSchedule(0, RUN - 4, 2)
    pruner = fxprune.Pruner(model, torch.zeros(4, 16), sparsity=SPARSITY, schedule=schedule, importance="magnitude")
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2), pruner


def train(call: Any, optimizer: Any, pruner: Any, steps: range, rank: int = 0, world: int = 1) -> None:
    """Train on this rank's part of batches of 16."""
    for step in steps:
        batch = torch.randn(16, 16, generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
        optimizer.zero_grad()
        (call(batch) - 1).square().mean().backward()
        optimizer.step()
        pruner.step()


def difference(a: nn.Module, b: nn.Module) -> dict[str, Any]:
    """Return the largest difference of two weights, and whether their zeros are at the same places."""
    pairs = list(zip(a.parameters(), b.parameters(), strict=True))
    largest = max(float((x - y).detach().abs().max()) for x, y in pairs)
    return {"largest difference": largest, "same zeros": all(torch.equal(x == 0, y == 0) for x, y in pairs)}


def resumed() -> dict[str, Any]:
    """Compare a run with one that was saved halfway and loaded into new objects."""
    whole, first = small_loop(), small_loop()
    train(*whole, range(RUN))
    train(*first, range(RUN // 2))
    second = small_loop()
    for to, saved in zip(second, first, strict=True):
        to.load_state_dict(saved.state_dict())
    train(*second, range(RUN // 2, RUN))
    return difference(whole[0], second[0])


def two_processes() -> dict[str, Any]:
    """Compare one process on whole batches with two under DistributedDataParallel on halves."""
    whole = small_loop()
    train(*whole, range(RUN))
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_of_two, (folder,), nprocs=2)
        models = [small(), small()]
        for rank, model in enumerate(models):
            model.load_state_dict(torch.load(Path(folder) / f"{rank}.pt", weights_only=True))
    return {**difference(whole[0], models[0]), "between ranks": difference(*models)["largest difference"]}


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, optimizer, pruner = small_loop()
    train(DistributedDataParallel(model), optimizer, pruner, range(RUN), rank, 2)
    torch.save(model.state_dict(), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
