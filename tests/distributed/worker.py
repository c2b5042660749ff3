"""One rank of the tests beside it: ``python worker.py CASE FOLDER`` with RANK and WORLD_SIZE set, or under torchrun.

Each case writes what rank r found to FOLDER/CASE-r.pt.
"""

from __future__ import annotations

import contextlib
import copy
import faulthandler
import io
import os
import signal
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import fxprune
from fxprune.decisions import LAST_REPORTS

SCHEDULE = fxprune.CubicSchedule(0, 6, 2)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 8))


class Wide(nn.Module):
    """Several of DDP's buckets of 1 MiB. Of the user's own class: Dynamo compiles no frame of torch.nn by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(16, 512), *[nn.Linear(512, 512) for _ in range(3)], nn.Linear(512, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = nn.functional.gelu(layer(x))
        return self.layers[-1](x)


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.gelu(self.layer(x))


class Deep(nn.Module):
    """Blocks that FSDP shards one by one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(16, 64), Block(64, 64), Block(64, 48), Block(48, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def batch(step: int, rank: int, world: int) -> Tensor:
    """Return this rank's part of a batch of 16; (16, 16) in all."""
    whole = torch.randn(16, 16, generator=torch.Generator().manual_seed(step))
    return whole.chunk(world)[rank]


def steps(model: Any, optimizer: Any, pruner: Any, which: range, rank: int, world: int) -> None:
    for step in which:
        optimizer.zero_grad()
        (model(batch(step, rank, world)) - 1).square().mean().backward()
        optimizer.step()
        pruner.step()


def pruned(model: nn.Module, importance: str = "taylor", **options: Any) -> Any:
    data = torch.zeros(4, 16)
    return fxprune.Pruner(model, data, sparsity=0.75, schedule=SCHEDULE, importance=importance, **options)


def full(model: nn.Module) -> dict[str, Tensor]:
    return {name: fxprune.hold.whole(p.detach()).clone() for name, p in model.named_parameters()}


def begun() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer, Any]:
    """Return a model, the same under DDP, its optimizer and its pruner by Taylor scores."""
    model = net()
    pruner, wrapped = pruned(model), DistributedDataParallel(model)
    return model, wrapped, torch.optim.AdamW(wrapped.parameters(), lr=1e-2), pruner


def save(wrapped: nn.Module, optimizer: torch.optim.Optimizer, pruner: Any, folder: Path) -> None:
    file = io.BytesIO()
    torch.save(pruner.state_dict(), file)
    state = {"model": get_model_state_dict(wrapped), "optimizer": get_optimizer_state_dict(wrapped, optimizer)}
    dcp.save({**state, "pruner": file.getvalue()}, checkpoint_id=folder)


def load(wrapped: nn.Module, optimizer: torch.optim.Optimizer, pruner: Any, folder: Path) -> None:
    state: dict[str, Any] = {
        "model": get_model_state_dict(wrapped),
        "optimizer": get_optimizer_state_dict(wrapped, optimizer),
        "pruner": b"",
    }
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(wrapped, state["model"])
    set_optimizer_state_dict(wrapped, optimizer, state["optimizer"])
    pruner.load_state_dict(torch.load(io.BytesIO(state["pruner"]), weights_only=True))


def ddp(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Gradual pruning; the state after three steps is saved for ``resume``."""
    model, wrapped, optimizer, pruner = begun()
    steps(wrapped, optimizer, pruner, range(3), rank, world)
    save(wrapped, optimizer, pruner, folder / "checkpoint")
    steps(wrapped, optimizer, pruner, range(3, 8), rank, world)
    return {"weights": full(model), "masks": pruner.state_dict()["masks"]}


def resume(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """A new process group goes on from the checkpoint."""
    model, wrapped, optimizer, pruner = begun()
    load(wrapped, optimizer, pruner, folder / "checkpoint")
    assert pruner.steps == 3
    steps(wrapped, optimizer, pruner, range(3, 8), rank, world)
    return {"weights": full(model), "masks": pruner.state_dict()["masks"]}


def killed(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Save every step; in step 5 of the first attempt a rank is killed, and both are started again."""
    first = os.environ["ATTEMPT"] == "0"
    model, wrapped, optimizer, pruner = begun()
    for done in range(8, 0, -1):
        if not first and (folder / f"step-{done}" / ".metadata").exists():
            load(wrapped, optimizer, pruner, folder / f"step-{done}")
            break
    started = pruner.steps
    for step in range(started, 8):
        if first and step == 5 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        steps(wrapped, optimizer, pruner, range(step, step + 1), rank, world)
        save(wrapped, optimizer, pruner, folder / f"step-{step + 1}")
    return {"weights": full(model), "masks": pruner.state_dict()["masks"], "started": started}


def fsdp(rank: int, world: int, folder: Path) -> dict[str, Any]:
    model = net()
    pruner = pruned(model)
    mesh = init_device_mesh("cpu", (world,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    steps(model, optimizer, pruner, range(8), rank, world)
    moments = {n: fxprune.hold.whole(optimizer.state[p]["exp_avg"]).clone() for n, p in model.named_parameters()}
    return {"weights": full(model), "masks": pruner.state_dict()["masks"], "moments": moments}


def dtensor(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Weights sharded over output features, as tensor parallelism keeps them."""
    model = net()
    pruner = pruned(model, "magnitude")
    mesh = init_device_mesh("cpu", (world,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    for _ in range(8):
        pruner.step()
    return {"weights": full(model), "masks": pruner.state_dict()["masks"]}


@contextlib.contextmanager
def pruned_gradients() -> Iterator[list[int]]:
    """Yield a list that receives how many gradients each compiled graph prunes."""
    from fxprune.passes.sdgp import Sdgp

    counts: list[int] = []
    original = Sdgp.__call__

    def spy(self: Sdgp, graph: Any) -> int:
        counts.append(original(self, graph))
        return counts[-1]

    Sdgp.__call__ = spy  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        Sdgp.__call__ = original  # type: ignore[method-assign]


def sdgp(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """DDP splits the graph at its buckets; each part has the pruned gradients of its layers."""
    model = Wide()
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1)
    call = compiled_pruned(wrapped)
    with pruned_gradients() as counts:
        (call(batch(0, rank, world)) - 1).square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {"counts": counts, "gradients": gradients}


def sharded(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """FSDP2 with pruned gradients: blocks compiled one by one, as torchtitan does, and the model as a whole."""
    return {
        "blocks": pruned_steps(lambda m: shard_blocks(m, world, True), rank, world),
        "whole": pruned_steps(lambda m: compiled_pruned(shard_blocks(m, world, False)), rank, world),
    }


def compiled_pruned(module: nn.Module) -> Any:
    options = {"fallback": "eager", "autotune": "off", "grad_sparsity": "2:4"}
    return torch.compile(module, backend=fxprune.hwprune, options=options)


def shard_blocks(model: Deep, world: int, compiled: bool) -> nn.Module:
    """Shard each block and then the rest; the hooks of FSDP lie around what is compiled."""
    mesh = init_device_mesh("cpu", (world,))
    for name, block in list(model.blocks.named_children()):
        model.blocks.register_module(name, compiled_pruned(block) if compiled else block)
        fully_shard(model.blocks.get_submodule(name), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def pruned_steps(wrap: Any, rank: int, world: int) -> dict[str, Any]:
    """Train four steps with pruned gradients while a Pruner prunes the weights; returns what the first and all did."""
    torch._dynamo.reset()
    model = Deep()
    pruner = pruned(model)
    call = wrap(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    gradients: dict[str, Tensor] = {}
    with pruned_gradients() as counts:
        for step in range(8):
            optimizer.zero_grad()
            (call(batch(step, rank, world)) - 1).square().mean().backward()
            if step == 0:
                named = plain_names(model).items()
                gradients = {name: fxprune.hold.whole(p.grad).clone() for name, p in named}
            optimizer.step()
            pruner.step()
    weights = {name: fxprune.hold.whole(p.detach()).clone() for name, p in plain_names(model).items()}
    return {"gradients": gradients, "counts": counts, "weights": weights, "masks": pruner.state_dict()["masks"]}


def plain_names(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name.replace("_orig_mod.", ""): p for name, p in model.named_parameters()}


def masked_steps(
    model: nn.Module, wrap: Any, rank: int, world: int, first: dict[str, Tensor] | None = None, **more: Any
) -> list[bool]:
    """Train four steps with the zeros of a plan held; returns which layers' masks are part of what was compiled.

    first: takes the gradients of the first step. more: options of the compile.
    """
    torch._dynamo.reset()
    result = fxprune.prune(model, torch.zeros(4, 16), sparsity=0.75, inplace=True)
    wrapped = wrap(model)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    result.plan.hold(optimizer)
    options = {"fallback": "eager", "autotune": "off", "min_speedup": 0.0, **more}
    call = torch.compile(wrapped, backend=fxprune.hwprune, options=options)
    LAST_REPORTS.clear()
    for step in range(4):
        optimizer.zero_grad()
        (call(batch(step, rank, world)) - 1).square().mean().backward()
        if first is not None and step == 0:
            first.update({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return [decision.chosen for context in LAST_REPORTS for decision in context.decisions]


def plan(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """A pruned model compiled under DDP as one graph, in which the weights are found."""
    model = Wide()
    with torch._dynamo.config.patch(optimize_ddp=False):
        chosen = masked_steps(model, lambda m: DistributedDataParallel(m, bucket_cap_mb=1), rank, world)
    return {"weights": full(model), "chosen": chosen}


def split(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """The same in graphs that DDP splits at its buckets: parts are compiled when they meet their weights."""
    model = Wide()
    chosen = masked_steps(model, lambda m: DistributedDataParallel(m, bucket_cap_mb=1), rank, world)
    return {"weights": full(model), "chosen": chosen, "parts": len(LAST_REPORTS)}


def both(rank: int, world: int, folder: Path) -> dict[str, Any]:
    """Masks of a plan and pruned data gradients in the parts that DDP splits the graph into."""
    model = Wide()
    wrapped = lambda m: DistributedDataParallel(m, bucket_cap_mb=1)  # noqa: E731
    return {**planned_and_pruned(model, wrapped, rank, world), "parts": len(LAST_REPORTS)}


def planned_and_pruned(model: nn.Module, wrap: Any, rank: int, world: int) -> dict[str, Any]:
    """Return gradients and weights of two steps with both, how many gradients were pruned, and the masks compiled."""
    gradients: dict[str, Tensor] = {}
    with pruned_gradients() as counts:
        chosen = masked_steps(model, wrap, rank, world, gradients, grad_sparsity="2:4")
    return {"weights": full(model), "gradients": gradients, "pruned": sum(counts), "chosen": chosen}


CASES = {
    "both": both,
    "killed": killed,
    "split": split,
    "plan": plan,
    "ddp": ddp,
    "resume": resume,
    "fsdp": fsdp,
    "dtensor": dtensor,
    "sdgp": sdgp,
    "sharded": sharded,
}


def meet(name: str, folder: Path, rank: int, world: int) -> None:
    """Start the process group. Under torchrun every attempt has keys of its own, as docs/training.md says it must."""
    timeout = timedelta(seconds=120)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os.environ["ATTEMPT"] = os.environ["TORCHELASTIC_RESTART_COUNT"]
        shared, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"attempt-{os.environ['ATTEMPT']}", shared)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timeout)
    else:
        method = f"file://{folder}/store-{name}-{os.environ['ATTEMPT']}"
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=world, timeout=timeout)


def main() -> None:
    names, folder = sys.argv[1].split(","), Path(sys.argv[2])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    faulthandler.dump_traceback_later(240, exit=True)  # says where it hung, and fails
    torch.set_num_threads(1)
    meet(names[0], folder, rank, world)
    for name in names:
        torch.save(copy.deepcopy(CASES[name](rank, world, folder)), folder / f"{name}-{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
