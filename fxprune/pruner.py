"""``fxprune.Pruner``: prune in the training loop, gradually, and hold what is pruned.

pruner = fxprune.Pruner(model, example_inputs, sparsity=0.75, schedule=fxprune.CubicSchedule(0, 1000, 50))
for x, y in data:
    loss_fn(model(x), y).backward()
    optimizer.step()
    pruner.step()
    optimizer.zero_grad()
result = pruner.finalize()
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.config import Config
from fxprune.errors import ConfigError, NotScored, WrongOptimizer
from fxprune.hold import Holder, Places, shard, whole
from fxprune.hold_steps import local
from fxprune.importance import Measured, element_scores
from fxprune.match import Match
from fxprune.plan import LayerPlan, Plan, PrunedWeight, register
from fxprune.planner import targets
from fxprune.progress import ProgressBar
from fxprune.prunable import contexts_of, prunable
from fxprune.prune import PruneResult, masks, wished
from fxprune.prune_report import achieved, table
from fxprune.pruner_state import VERSION, check, saved_layer
from fxprune.schedules import OneShotSchedule, Schedule
from fxprune.sparsity import get, refit
from fxprune.taylor import TaylorScores, laid_out
from fxprune.write import Decided

_FLOOR = 1e-9  # of a layer's largest score: its square is still a number


class Pruner:
    """Prunes ``model`` in place while it trains. Call :meth:`step` after the optimizer's step.

    sparsity, filter_fn, options: as in :func:`fxprune.prune`; the sparsity is that of the last round. Every round chooses
        its masks with the patterns and counts of the kernels that will run them, so that the last one is no special case.
    schedule: rounds; by default one, when the pruner is made. Over several rounds ``columns`` is off unless given: a column
        that goes moves the tiles of those behind it, and rows of the old and the new tiles add up to more than was asked.
    importance: "magnitude", "l1", "l2", "random", a callable ``(name, weight) -> scores``, or "taylor": the sum of
        ``(gradient * weight)^2`` over the last ``window`` optimizer steps before each round (Molchanov et al., CVPR 2019).
        A layer without gradients in them, frozen or unused, keeps its mask, with a
        :class:`~fxprune.errors.NotScored` warning.
    growth: keep the values of pruned weights, so that :meth:`reselect` may bring some of them back. Without it what is
        pruned stays pruned.

    Masks are held by writing zeros after every step of every optimizer of this process, to the weights and to what the
    optimizer keeps in the weight's shape (moments; factored or blocked state is left alone). They are no part of the
    compiled function, so no round compiles anything. A copy of the weights that is averaged over steps (EMA) holds what was
    pruned later; :meth:`apply` zeroes it.

    Over several ranks scores are averaged, so that every rank chooses the same masks; DTensor weights are gathered for a
    round. Make the pruner before ``fully_shard``, on every rank.

    Raises the errors of :func:`fxprune.prune` and leaves the model as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        *,
        sparsity: float | Mapping[str, float] | None = None,
        schedule: Schedule | None = None,
        importance: str | Callable[..., Any] = "magnitude",
        window: int = 10,
        growth: bool = False,
        filter_fn: Callable[[nn.Module, str], bool] | None = None,
        **options: Any,
    ) -> None:
        self.schedule: Schedule = schedule or OneShotSchedule()
        self._taylor = importance == "taylor"
        self._config = Config.from_options({"sparsity": sparsity, "importance": importance, **options})
        if self._config.columns is None and not isinstance(self.schedule, OneShotSchedule):
            self._config = replace(self._config, columns=False)
        self._check(window)
        self._asked, self._window, self._growth = sparsity, window, growth
        self._model = model
        self._contexts = contexts_of(model, example_inputs, self._config)
        self._found = prunable(model, self._contexts, filter_fn)
        wanted = targets(self._found, self._config)
        self._matches = [m for m in self._found if m.parameter in wanted]
        if not self._matches:
            # says why there is nothing to prune, unless n of n is asked
            masks(self._contexts, self._found, self._config)
        self._places = Places(model)
        self._step, self._final = 0, False
        self._scores = TaylorScores([m.parameter for m in self._matches], self._places, self._in_window)
        self._before: dict[str, Tensor] = {}  # growth: the values that pruned weights had
        self._pruned: dict[str, PrunedWeight] = {}
        self._layers: dict[str, LayerPlan] = {}
        self._decided = Decided()
        self._bar = ProgressBar(self.schedule.last)
        self._holder = Holder(self._places, masks_gradients=not growth)  # those of pruned weights may say what grows
        self._holder.watch(m.parameter for m in self._matches)
        if self._taylor:
            self._holder.before_step(self._scores.accumulate)
        if self.schedule.is_round(0):
            self._round()

    @property
    def plan(self) -> Plan:
        """What is pruned now."""
        return Plan(list(self._layers.values()), weights=dict(self._pruned))

    @property
    def sparsity(self) -> dict[str, float]:
        """The fraction of zeros now, by the keys asked for and by kind."""
        return achieved(list(self._layers.values()), self._asked)

    @property
    def steps(self) -> int:
        """How many times :meth:`step` was called."""
        return self._step

    def step(self) -> bool:
        """Count a step, prune if the schedule has a round now, and hold the masks. Returns whether it pruned.

        Raises :class:`~fxprune.errors.WrongOptimizer` when a parameter of ours needs gradients, optimizers stepped and
        none has one of ours, nor had one before that lives, and :class:`~fxprune.errors.ConfigError` after :meth:`finalize`.
        """
        if self._final:
            expected = "no more steps: plan.hold(optimizer) of the result holds the zeros while training goes on"
            raise ConfigError(name="step", given="a pruner after finalize()", expected=expected)
        if self._holder.foreign and not (self._holder.touched or self._holder.waits()) and self._trains():
            raise WrongOptimizer(count=len(self._matches), name=self._matches[0].parameter)
        self._step += 1
        due = self.schedule.is_round(self._step)
        if due:
            self._round()
        elif self._holder.touched:
            self._holder.undo()
        else:
            self._holder.project()
        self._holder.touched = self._holder.foreign = False
        self._bar.show(self._step, self.sparsity.get("all", 0.0) if self._bar.visible else 0.0)
        return due

    def reselect(self) -> None:
        """Choose all masks of the sparsity reached anew; what returns has the value it had when it was pruned.

        Needs ``growth=True``.
        """
        if not self._growth:
            raise ConfigError(name="growth", given=False, expected="True to choose again what was pruned")
        with torch.no_grad():
            for name, values in self._before.items():
                parameter = self._places[name]
                own = local(parameter)
                own.copy_(torch.where(shard(self._pruned[name].mask, parameter), own, local(values)))
        self._pruned, self._layers = {}, {}
        self._round()

    def apply(self, model: nn.Module) -> None:
        """Zero in another model of the same names, such as an average of the weights, what is pruned in this one."""
        others = dict(model.named_parameters(remove_duplicate=False))
        for name, pruned in self._pruned.items():
            given = f"{name!r} of shape {tuple(others[name].shape)}" if name in others else f"no parameter {name!r}"
            if name not in others or others[name].shape != pruned.mask.shape:
                raise ConfigError(name="model", given=given, expected=f"{name!r} of shape {tuple(pruned.mask.shape)}")
        with torch.no_grad():
            for name, pruned in self._pruned.items():
                local(others[name]).masked_fill_(shard(~pruned.mask, others[name]), 0)

    def finalize(self) -> PruneResult:
        """Stop, and attach the plan to the model, a plain dense one with zeros; returns what ``fxprune.prune`` does."""
        self._holder.project()
        self._holder.release()
        self._final = True
        self._bar.close()
        for name, pruned in self._pruned.items():
            register(self._places[name], pruned)
        report = table(list(self._layers.values()), self._decided, self._contexts, None, None)
        return PruneResult(self._model, Plan.of(self._model, list(self._layers.values())), self.sparsity, report)

    def state_dict(self) -> dict[str, Any]:
        """Return plain tensors and values from which :meth:`load_state_dict` goes on bit for bit."""
        return {
            "version": VERSION,
            "step": self._step,
            "masks": {name: pruned.mask.clone() for name, pruned in self._pruned.items()},
            "patterns": {name: pruned.pattern for name, pruned in self._pruned.items()},
            "structures": {name: self._structure(name).clone() for name in self._pruned},
            "granularity": {name: pruned.layer.tiling.granularity for name, pruned in self._pruned.items()},
            "layers": {name: asdict(layer) for name, layer in self._layers.items()},
            "scores": self._scores.state_dict(),
            "before": {name: whole(values).clone() for name, values in self._before.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Raises :class:`~fxprune.errors.StateMismatch` and changes nothing if it is another's."""
        check(state, self._places, self._growth)
        by_name = {m.parameter: m for m in self._matches}
        pruned = {}
        for name, mask in state["masks"].items():
            match, pattern, width = by_name.get(name), state["patterns"][name], state["granularity"][name]
            structure = state["structures"][name].bool()
            matrix = structure.reshape(len(structure), -1) if match is None else match.matrix(structure)
            drops = match is None or match.geometry.groups == 1
            layer = refit(matrix, width, match is not None and match.kind == "depthwise", drops)
            pruned[name] = PrunedWeight(pattern, layer, mask.bool().clone())
        layers = {name: saved_layer(fields) for name, fields in state["layers"].items()}
        before = {name: laid_out(values, self._places[name]) for name, values in state["before"].items() if self._growth}
        self._step, self._pruned, self._layers, self._before = int(state["step"]), pruned, layers, before
        self._scores.load_state_dict(state["scores"])
        self._holder.set({name: found.mask for name, found in pruned.items()})

    def __getstate__(self) -> Any:
        expected = "state_dict(), loaded into a Pruner that was made for the other model"
        raise ConfigError(name="pruner", given="a copy or a pickle of it, which would watch no optimizer", expected=expected)

    def _check(self, window: Any) -> None:
        names = [*self._config.pattern.values()] if isinstance(self._config.pattern, Mapping) else [self._config.pattern]
        fixed = any(name != "auto" and get(name).fixed is not None for name in names)
        if self._config.has_target:
            given = next(n for n in ("target_speedup", "target_latency_ms") if getattr(self._config, n) is not None)
            raise ConfigError(name=given, given=getattr(self._config, given), expected="sparsity= in its place")
        if self._config.sparsity is None and not fixed:
            raise ConfigError(name="sparsity", given=None, expected="a fraction of zeros")
        if fixed and not isinstance(self.schedule, OneShotSchedule):
            raise ConfigError(name="schedule", given=self.schedule, expected="OneShotSchedule: n:m has one sparsity")
        if self._taylor and self.schedule.is_round(0):
            expected = "a first round after step 1 or later: 'taylor' scores by the gradients of steps"
            raise ConfigError(name="schedule", given=self.schedule, expected=expected)
        if not isinstance(window, int) or isinstance(window, bool) or window < 1:
            raise ConfigError(name="window", given=window, expected="a positive integer")

    def _structure(self, name: str) -> Tensor:
        """Return the mask that the kernel runs, in the weight's shape: it covers the mask that is held."""
        pruned = self._pruned[name]
        match = next((m for m in self._matches if m.parameter == name), None)
        matrix = pruned.layer.mask
        return (matrix if match is None else match.restore(matrix)).reshape(pruned.mask.shape)

    def _trains(self) -> bool:
        return any(self._places[match.parameter].requires_grad for match in self._matches)

    def _in_window(self) -> bool:
        return any(self.schedule.is_round(self._step + ahead) for ahead in range(1, self._window + 1))

    def _round(self) -> None:
        """Choose masks for the sparsity of now, join them with those held, and write zeros."""
        config = replace(self._config, sparsity=self._now())
        if self._taylor:
            scores, unscored = self._scores.measured(self._window)
            if unscored:
                warnings.warn(NotScored(unscored, self._window), stacklevel=3)
            config = replace(config, importance=scores, ignored_layers=(*config.ignored_layers, *map(escape, unscored)))
        matches = [self._live(match) for match in self._found]
        if self._pruned:
            masks_held = {name: pruned.mask for name, pruned in self._pruned.items()}
            config = replace(config, importance=_Ranked({}, True, {m.parameter: m for m in matches}, config, masks_held))
        decided = masks(self._contexts, matches, config)
        for wish in wished(decided):
            held = self._pruned.get(wish.parameter)
            mask = wish.mask.cpu() if held is None else _both(wish.mask.cpu(), held.mask)
            pruned = PrunedWeight(wish.pattern, wish.layer, mask)
            self._remember(wish.parameter, held, mask)
            self._pruned[wish.parameter] = pruned
            if (layer := wish.layer_plan(pruned)) is not None:
                self._layers[wish.parameter] = layer
        self._decided = decided
        self._scores.clear()
        self._holder.set({name: pruned.mask for name, pruned in self._pruned.items()})

    def _now(self) -> float | Mapping[str, float] | None:
        """Return the sparsity asked for at this step."""
        wanted, at = self._asked, min(self._step, self.schedule.last)
        if isinstance(wanted, Mapping):
            return {key: self.schedule.sparsity(at, value) for key, value in wanted.items()}
        return None if wanted is None else self.schedule.sparsity(at, wanted)

    def _live(self, match: Match) -> Match:
        value = whole(self._places[match.parameter])
        return match if value is match.value else replace(match, value=value)

    @torch.no_grad()
    def _remember(self, name: str, held: PrunedWeight | None, mask: Tensor) -> None:
        """Keep the values that go now."""
        if not self._growth:
            return
        parameter = self._places[name]
        known = self._before.get(name)
        if known is None:
            known = self._before[name] = torch.zeros_like(parameter)
        going = ~mask if held is None else ~mask & held.mask
        own = local(known)
        own.copy_(torch.where(shard(going, parameter), local(parameter), own))


def _both(a: Tensor, b: Tensor) -> Tensor:
    """Return a & b of bool tensors; PyTorch's AND of bytes is vectorised, that of bools is not."""
    return (a.view(torch.uint8) & b.view(torch.uint8)).view(torch.bool)


@dataclass(frozen=True, eq=False)
class _Ranked(Measured):
    """Scores that put what is pruned below everything else, also below weights that score nothing.

    They are made when the planner asks for them, of one layer after the other, while its weight is in the cache.
    """

    matches: Mapping[str, Match] = field(default_factory=dict)
    config: Config = field(default_factory=Config)
    masks: Mapping[str, Tensor] = field(default_factory=dict)

    def __call__(self, parameter: str, weight: Tensor) -> Tensor:
        magnitudes = self.config.importance in ("magnitude", "l1") and weight.dtype == torch.float32
        scores = weight if magnitudes else element_scores(self.matches[parameter], self.config).detach().float()
        mask = self.masks.get(parameter)
        if mask is None:
            return scores.abs() if magnitudes else scores
        return torch.ops.fxprune.held_scores(scores.contiguous(), mask.to(scores.device).contiguous(), _FLOOR, magnitudes)
