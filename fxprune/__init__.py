"""fxprune: prune PyTorch models in patterns the hardware runs fast, and run them fast.

result = fxprune.prune(model, example_inputs, sparsity=0.6)
fast = torch.compile(result.model, backend="hwprune")
"""

import sys as _sys
from importlib.machinery import ModuleSpec as _ModuleSpec
from importlib.util import spec_from_file_location as _spec_of
from pathlib import Path as _Path
from typing import Any as _Any

_root = _Path(__file__).resolve().parent.parent


class _Beside:
    """In a checkout `passes/` and `lowering/` lie beside this package; installed, they are inside it.

    The checkout itself is no place for modules of this package: it holds the package, so whoever walks it never ends.
    """

    @staticmethod
    def find_spec(name: str, path: _Any = None, target: _Any = None) -> _ModuleSpec | None:
        package, _, inner = name.partition(".")
        if package != "fxprune" or inner not in ("passes", "lowering"):
            return None
        folder = _root / inner
        return _spec_of(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


if (_root / "pyproject.toml").is_file() and _Beside not in _sys.meta_path:
    _sys.meta_path.insert(0, _Beside)  # before the finder of an editable install of another checkout

from fxprune.lowering.registration import register as _register_operators  # noqa: E402

_register_operators()  # before the modules that name torch.ops.fxprune

__version__ = "0.1.0"

from fxprune.apply import apply_plan, recalibrate  # noqa: E402
from fxprune.backend import hwprune, register  # noqa: E402
from fxprune.benchmark import benchmark  # noqa: E402
from fxprune.compiled import refresh  # noqa: E402
from fxprune.config import Config  # noqa: E402
from fxprune.decisions import gradient_report  # noqa: E402
from fxprune.decompositions import decompositions  # noqa: E402
from fxprune.explain import explain, levels, stages  # noqa: E402
from fxprune.export import Exported, Loaded, export, load  # noqa: E402
from fxprune.gradients import gradient_clock  # noqa: E402
from fxprune.lowering.calibrate import calibrate  # noqa: E402
from fxprune.plan import Plan  # noqa: E402
from fxprune.plan_file import load_plan  # noqa: E402
from fxprune.prune import PruneResult, prune  # noqa: E402
from fxprune.pruner import Pruner  # noqa: E402
from fxprune.schedules import CubicSchedule, IterativeSchedule, LinearSchedule, OneShotSchedule  # noqa: E402
from fxprune.sensitivity import sensitivity  # noqa: E402
from fxprune.verify import verify  # noqa: E402

__all__ = [
    "Config",
    "CubicSchedule",
    "Exported",
    "IterativeSchedule",
    "LinearSchedule",
    "Loaded",
    "OneShotSchedule",
    "Plan",
    "PruneResult",
    "Pruner",
    "apply_plan",
    "benchmark",
    "calibrate",
    "decompositions",
    "explain",
    "export",
    "gradient_clock",
    "gradient_report",
    "hwprune",
    "levels",
    "load",
    "load_plan",
    "prune",
    "recalibrate",
    "refresh",
    "register",
    "sensitivity",
    "stages",
    "verify",
]
