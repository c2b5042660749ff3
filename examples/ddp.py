"""Prune weights and gradients while two processes train one model: DistributedDataParallel over gloo.

    python examples/ddp.py [--steps 60] [--processes 2]
    torchrun --nproc-per-node 2 examples/ddp.py

The pruner is made on every rank before the model is wrapped. Scores are averaged over the ranks, so that all choose the
same masks; the data gradients are pruned in each rank's backward graph. Then the pruned model is compiled under DDP and
trains on, with its zeros a part of what is compiled. Rank 0 prints; the program fails when ranks differ.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fxprune

BATCH, SPARSITY = 64, 0.75


class Net(nn.Module):
    """A class of one's own: Dynamo compiles no frame of torch.nn, which is what it finds inside DDP."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 256), nn.Linear(256, 256), nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.second(F.relu(self.first(x)))))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="while it is pruned, and as many afterwards")
    parser.add_argument("--processes", type=int, default=2, help="to start, unless torchrun has")
    args = parser.parse_args(argv)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        train(args.steps)
        dist.destroy_process_group()
        return 0
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(start, (args.processes, args.steps, folder), nprocs=args.processes)
    return 0


def start(rank: int, world: int, steps: int, folder: str) -> None:
    """Run one process of those that this program starts."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    train(steps)
    dist.destroy_process_group()


def train(steps: int) -> None:
    logging.getLogger("torch").setLevel(logging.ERROR)
    fxprune.register()
    torch.manual_seed(0)
    model = Net()
    images, classes = data()
    schedule = fxprune.CubicSchedule(steps // 6, steps * 2 // 3, max(1, steps // 12))
    layers = {"first": SPARSITY, "second": SPARSITY}
    pruner = fxprune.Pruner(model, images[:BATCH], sparsity=layers, schedule=schedule, importance="taylor")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)

    call = torch.compile(DistributedDataParallel(model), backend="hwprune", options={"grad_sparsity": "2:4"})
    for step in range(steps):
        update(call, optimizer, images, classes, step)
        pruner.step()
    result = pruner.finalize()
    report("pruned gradually", model, images, classes)
    if dist.get_rank() == 0:
        print(fxprune.gradient_report(), flush=True)

    torch._dynamo.reset()
    result.plan.hold(optimizer)
    call = torch.compile(DistributedDataParallel(model), backend="hwprune")
    for step in range(steps, 2 * steps):
        update(call, optimizer, images, classes, step)
    report("fine-tuned with its plan", model, images, classes)
    zeros = (model.second.weight == 0).float().mean().item()
    if dist.get_rank() == 0:
        print(f"zeros of the second layer: {zeros:.1%}", flush=True)


def update(call: Any, optimizer: torch.optim.Optimizer, images: Tensor, classes: Tensor, step: int) -> None:
    """Take one step on this rank's share of a batch."""
    gen = torch.Generator().manual_seed(step)
    part = torch.randperm(len(images) - 400, generator=gen)[:BATCH].chunk(dist.get_world_size())[dist.get_rank()]
    optimizer.zero_grad()
    F.cross_entropy(call(images[part]), classes[part]).backward()
    optimizer.step()


@torch.no_grad()
def report(what: str, model: nn.Module, images: Tensor, classes: Tensor) -> None:
    """Print accuracy on the images that nobody trains on; raise when a rank has other weights than rank 0."""
    for name, parameter in model.named_parameters():
        first = parameter.detach().clone()
        dist.broadcast(first, 0)
        if not torch.equal(first, parameter):
            raise RuntimeError(f"rank {dist.get_rank()} has another {name!r} than rank 0")
    right = (model(images[-400:]).argmax(1) == classes[-400:]).float().mean().item()
    if dist.get_rank() == 0:
        print(f"{what}: accuracy {right:.1%}, all {dist.get_world_size()} ranks have the same weights", flush=True)


def data() -> tuple[Tensor, Tensor]:
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(digits.data, dtype=torch.float32)[order] / 8 - 1, torch.tensor(digits.target)[order]


if __name__ == "__main__":
    sys.exit(main())
