"""Two gloo processes prune as one does: DDP, FSDP2, DTensor weights, SDGP in split graphs, and a restart."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import fxprune

WORKER = Path(__file__).resolve().parent / "worker.py"
pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(WORKER.parent.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}


def attempt(cases: str, folder: Path, number: int) -> tuple[list[int], str]:
    """Run both ranks; returns their exit codes and what they said. A rank that fails takes the other down."""
    both = [
        subprocess.Popen(
            [sys.executable, str(WORKER), cases, str(folder)],
            env={**environment(), "WORLD_SIZE": "2", "RANK": str(rank), "ATTEMPT": str(number)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=300)[1] for rank in both]
    return [rank.returncode for rank in both], "\n".join(error[-3000:] for error in errors)


def launch(cases: str, folder: Path, number: int = 0) -> None:
    codes, errors = attempt(cases, folder, number)
    assert codes == [0, 0], errors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    launch("ddp,fsdp,dtensor,sdgp,plan,split,both,sharded", path)
    launch("resume", path)
    return path


@pytest.fixture(scope="module")
def worker() -> Any:
    spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def single(worker: Any) -> dict[str, dict[str, Tensor]]:
    """The same training in one process on whole batches."""
    model = worker.net()
    pruner = worker.pruned(model)
    worker.steps(model, torch.optim.AdamW(model.parameters(), lr=1e-2), pruner, range(8), 0, 1)
    return {"weights": worker.full(model), "masks": pruner.state_dict()["masks"]}


def found(folder: Path, case: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return tuple(torch.load(folder / f"{case}-{rank}.pt", weights_only=True) for rank in range(2))  # type: ignore[return-value]


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


@pytest.mark.parametrize("case", ["ddp", "resume", "fsdp", "dtensor"])
def test_every_rank_has_the_same_masks_and_weights(folder: Path, case: str) -> None:
    first, second = found(folder, case)
    same(first["masks"], second["masks"])
    same(first["weights"], second["weights"])
    for name, mask in first["masks"].items():
        assert not first["weights"][name][~mask].any() and 0.7 < 1 - mask.float().mean() < 0.85, name


@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_two_ranks_train_as_one_process(folder: Path, case: str, single: dict[str, Any]) -> None:
    given = found(folder, case)[0]
    same(given["masks"], single["masks"])
    for name, value in single["weights"].items():
        torch.testing.assert_close(given["weights"][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_sharded_moments_are_zero_where_the_weight_is(folder: Path) -> None:
    given = found(folder, "fsdp")[0]
    for name, mask in given["masks"].items():
        assert given["moments"][name].shape == mask.shape and not given["moments"][name][~mask].any(), name


def test_sharded_weights_prune_as_whole_ones(folder: Path, worker: Any) -> None:
    model = worker.net()
    pruner = worker.pruned(model, "magnitude")
    for _ in range(8):
        pruner.step()
    same(found(folder, "dtensor")[0]["masks"], pruner.state_dict()["masks"])
    same(found(folder, "dtensor")[0]["weights"], worker.full(model))


def test_a_restarted_group_ends_where_the_first_did(folder: Path) -> None:
    same(found(folder, "resume")[0]["weights"], found(folder, "ddp")[0]["weights"])
    same(found(folder, "resume")[0]["masks"], found(folder, "ddp")[0]["masks"])


def test_a_rank_that_dies_and_restarts_ends_where_the_others_did(folder: Path, tmp_path: Path) -> None:
    codes, errors = attempt("killed", tmp_path, 0)
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, None), errors
    launch("killed", tmp_path, 1)
    first, second = found(tmp_path, "killed")
    assert first["started"] == second["started"] == 5
    for given in (first, second):
        same(given["weights"], found(folder, "ddp")[0]["weights"])
        same(given["masks"], found(folder, "ddp")[0]["masks"])


@pytest.mark.parametrize("case", ["plan", "split"])
def test_a_pruned_model_compiled_under_ddp_trains_as_one_process(folder: Path, worker: Any, case: str) -> None:
    first, second = found(folder, case)
    same(first["weights"], second["weights"])
    assert len(first["chosen"]) == 5 and all(first["chosen"]) and (case == "plan" or first["parts"] > 1)
    torch._dynamo.reset()
    model = worker.Wide()
    assert all(worker.masked_steps(model, lambda m: m, 0, 1))
    for name, value in worker.full(model).items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-4, atol=1e-5, msg=name)
        assert torch.equal(first["weights"][name] == 0, value == 0), name
        assert name.endswith("bias") or (value == 0).float().mean() > 0.5, name


def test_split_graphs_have_their_pruned_gradients(folder: Path, worker: Any) -> None:
    first, second = found(folder, "sdgp")
    same(first["gradients"], second["gradients"])
    assert len(first["counts"]) > 1 and sum(first["counts"]) == 4  # the first layer's input needs no gradient
    torch._dynamo.reset()
    model = worker.Wide()
    options = {"fallback": "eager", "autotune": "off", "grad_sparsity": "2:4"}
    call = torch.compile(model, backend=fxprune.hwprune, options=options)
    (call(worker.batch(0, 0, 1)) - 1).square().mean().backward()
    dense = worker.Wide()
    (dense(worker.batch(0, 0, 1)) - 1).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(first["gradients"][name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert not torch.allclose(first["gradients"]["layers.0.weight"], dense.layers[0].weight.grad, rtol=1e-2)
    torch._dynamo.reset()


def test_masks_of_a_plan_and_pruned_gradients_together_in_split_graphs(folder: Path, worker: Any) -> None:
    first, second = found(folder, "both")
    same(first["weights"], second["weights"])
    same(first["gradients"], second["gradients"])
    assert first["parts"] > 1 and len(first["chosen"]) == 5 and all(first["chosen"])
    assert first["pruned"] == 4  # the first layer's input needs no gradient
    torch._dynamo.reset()
    whole = worker.planned_and_pruned(worker.Wide(), lambda m: m, 0, 1)
    assert whole["pruned"] == 4 and all(whole["chosen"])
    for name, value in whole["gradients"].items():
        torch.testing.assert_close(first["gradients"][name], value, rtol=1e-4, atol=1e-6, msg=name)
    for name, value in whole["weights"].items():
        assert torch.equal(first["weights"][name] == 0, value == 0), name
        assert name.endswith("bias") or (value == 0).float().mean() > 0.5, name
    masked = worker.Wide()
    dense: dict[str, Tensor] = {}
    worker.masked_steps(masked, lambda m: m, 0, 1, dense)
    assert not torch.allclose(whole["gradients"]["layers.0.weight"], dense["layers.0.weight"], rtol=1e-2)
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["blocks", "whole"])
def test_pruned_gradients_and_a_pruner_under_fsdp(folder: Path, worker: Any, how: str) -> None:
    first, second = (given[how] for given in found(folder, "sharded"))
    for part in ("gradients", "weights", "masks"):
        same(first[part], second[part])
    assert sum(first["counts"]) == 3  # the first layer's input needs no gradient
    alone = worker.pruned_steps(worker.compiled_pruned, 0, 1)
    assert sum(alone["counts"]) == 3
    for name, value in alone["gradients"].items():
        torch.testing.assert_close(first["gradients"][name], value, rtol=1e-4, atol=1e-6, msg=name)
    same(first["masks"], alone["masks"])
    for name, value in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, rtol=1e-3, atol=1e-4, msg=name)
        assert torch.equal(first["weights"][name] == 0, value == 0), name
    dense = worker.Deep()
    (dense(worker.batch(0, 0, 1)) - 1).square().mean().backward()
    grad = dense.blocks[0].layer.weight.grad
    assert not torch.allclose(first["gradients"]["blocks.0.layer.weight"], grad, rtol=1e-2)
    torch._dynamo.reset()


def test_torchrun_restarts_a_group_whose_rank_died(folder: Path, tmp_path: Path) -> None:
    """Rank 1 is killed in step 5; the agent starts both again, and they go on from the distributed checkpoint."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"]
    command = [sys.executable, *launcher, str(WORKER), "killed", str(tmp_path)]
    group = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said = group.communicate(timeout=560)[0]
    except subprocess.TimeoutExpired:  # a worker prints its stack and fails long before
        os.killpg(group.pid, signal.SIGKILL)
        pytest.fail(f"the agent hung:\n{group.communicate()[0][-6000:]}")
    assert group.returncode == 0, said[-6000:]
    assert "exitcode: -9" in said  # the agent saw it die
    first, second = found(tmp_path, "killed")
    assert first["started"] == second["started"] == 5
    for given in (first, second):
        same(given["weights"], found(folder, "ddp")[0]["weights"])
        same(given["masks"], found(folder, "ddp")[0]["masks"])
