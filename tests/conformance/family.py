"""One row of the family table: four ways to run one timm model, each compared with the one before it.

eager: the model runs. aot_eager: a compiler that is not ours agrees with eager; where it does not, we are not to blame.
exact: ``hwprune`` without zeros hands every graph to stock and agrees with eager. pruned: half of the weights are zero,
every kernel is forced, and the result is that of the masked dense model.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.fx import GraphModule

import fxprune
from benchmarks import zoo
from fxprune import backend
from fxprune.capture import Captured, detect
from fxprune.compiled import CompiledGraph
from fxprune.config import Config
from fxprune.context import Decision
from fxprune.errors import NothingToPrune
from tests.oracle import FORCED, assert_close_fp64, widened

COLUMNS = (
    "family",
    "model",
    "side",
    "parameters",
    "eager",
    "aot_eager",
    "exact",
    "pruned",
    "matches",
    "layers pruned",
    "layers rewritten",
    "graphs",
    "breaks",
    "reason",
)
BATCH = 2
SPARSITY = 0.5


def build(name: str, side: int, seed: int = 0) -> nn.Module:
    """Return the model for images of ``side`` pixels in evaluation mode, with weights that all show in the output."""
    with torch.random.fork_rng(devices=[]), zoo.torchvision_absent(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm

        torch.manual_seed(seed)
        try:
            model = timm.create_model(name, img_size=side)
        except TypeError:  # it takes any size
            model = timm.create_model(name)
        awaken(model.eval())
        zoo.calibrate(model, [torch.randn(4, 3, side, side)])
    return model.eval()


@torch.no_grad()
def awaken(model: nn.Module) -> None:
    """Draw constant parameters anew, and fill the zeros of the others.

    A layer scale of 1e-5, a last gamma of zero or a bias of zero would hide a wrong branch from the output.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() < 2:
            continue
        if not bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_((parameter == 0) * torch.randn_like(parameter), alpha=0.02)
        elif parameter.flatten()[0].item() == 1.0:
            parameter.uniform_(0.5, 1.5)
        elif parameter.dim() == 1 and not name.endswith("bias"):
            parameter.uniform_(0.3, 0.7)
        else:
            parameter.normal_(0.0, 0.1)


def images(side: int, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def row(family: str, name: str, side: int) -> dict[str, str]:
    """Return the cells of :data:`COLUMNS`; a column that fails says so, and ``reason`` says why."""
    cells = dict.fromkeys(COLUMNS, "")
    cells.update(family=family, model=name, side=str(side))
    reasons: list[str] = []
    try:
        model, x = build(name, side), images(side)
        cells["parameters"] = str(sum(p.numel() for p in model.parameters()))
        expected = run(model, x)
        cells["eager"] = "runs"
    except Exception as error:
        cells.update(eager="fails", reason=f"eager: {brief(error)}")
        return cells
    exact = double(model, x)

    hwprune = Recorded(model)

    def attempt(column: str, body: Callable[[], str]) -> None:
        try:
            cells[column] = body()
        except AssertionError as error:
            cells[column] = "differs"
            reasons.append(f"{column}: {brief(error)}")
        except Exception as error:
            cells[column] = "fails"
            reasons.append(f"{column}: {brief(error)}")

    torch._dynamo.reset()
    attempt("aot_eager", lambda: equal(run(torch.compile(model, backend="aot_eager"), x), expected, exact))
    torch._dynamo.reset()
    attempt("exact", lambda: _exact(hwprune, x, expected, exact, cells))
    attempt("pruned", lambda: _pruned(model, hwprune, x, cells, reasons))
    torch._dynamo.reset()
    cells["reason"] = "; ".join(reasons)
    return cells


class Recorded:
    """A model under our backend with every kernel forced, and what was found in its graphs."""

    def __init__(self, model: nn.Module) -> None:
        self.graphs: list[Any] = []
        self.kinds: Counter[str] = Counter()
        self.blocks: Counter[str] = Counter()
        self.call = torch.compile(model, backend=self._compile)

    def _compile(self, gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found = detect(Captured(gm, tuple(inputs)), Config())
        self.kinds.update(m.kind for m in found.matches)
        self.blocks.update(b.kind for b in found.blocks)
        self.graphs.append(backend.hwprune(gm, inputs, options=FORCED))
        return self.graphs[-1]

    @property
    def decisions(self) -> list[Decision]:
        contexts = [g.context for g in self.graphs if isinstance(g, CompiledGraph)]
        return [d for context in contexts if context is not None for d in context.decisions]


def _exact(hwprune: Recorded, x: Tensor, expected: Any, exact: Any, cells: dict[str, str]) -> str:
    counters.clear()
    given = run(hwprune.call, x)
    cells["matches"] = ", ".join(f"{kind} {count}" for kind, count in sorted(hwprune.kinds.items()))
    cells["graphs"] = str(len(hwprune.graphs))
    cells["breaks"] = str(sum(counters["graph_break"].values()))
    placed = [d.match.name for d in hwprune.decisions if d.chosen]
    assert not placed, f"kernels without zeros: {placed[:3]}"
    return equal(given, expected, exact)


def _pruned(model: nn.Module, hwprune: Recorded, x: Tensor, cells: dict[str, str], reasons: list[str]) -> str:
    """Prune the compiled model in place: its graphs notice."""
    try:
        result = fxprune.prune(model, x, sparsity=SPARSITY, inplace=True)
    except NothingToPrune:
        return "nothing to prune"
    given = run(hwprune.call, x)
    decided = [d for d in hwprune.decisions if d.mask is not None]
    ours = {d.match.parameter for d in decided if d.chosen}
    cells["layers pruned"], cells["layers rewritten"] = str(len(result.plan)), str(len(ours))
    left = Counter(d.reason for d in decided if not d.chosen)
    reasons += [f"{count} dense: {reason}" for reason, count in sorted(left.items())]
    return equal(given, run(model, x), double(model, x))


def equal(given: Any, expected: Any, exact: Any) -> str:
    """Return "equal"; raises ``AssertionError`` when two float32 outputs differ by more than the fp64 rule allows."""
    assert_close_fp64(given, expected, exact, tolerance=1e-4)
    return "equal"


def double(model: nn.Module, *inputs: Tensor) -> Any:
    return run(copy.deepcopy(model).double(), *widened(inputs))


@torch.no_grad()
def run(call: Any, *inputs: Tensor) -> Any:
    return call(*inputs)


def brief(error: BaseException) -> str:
    """The first line of an error without what differs from run to run."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    text = re.sub(r"0x[0-9a-f]+|/\S+/", "", text).partition("; reproduce")[0]
    return f"{type(error).__name__}: {text}"[:160]
