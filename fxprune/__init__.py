"""fxprune: prune PyTorch models in patterns the hardware runs fast, and run them fast.

result = fxprune.prune(model, example_inputs, sparsity=0.6)
fast = torch.compile(result.model, backend="hwprune")
"""

from pathlib import Path as _Path

# In a checkout `passes/` and `lowering/` lie beside this package; installed, they are inside it.
_root = _Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and str(_root) not in __path__:
    __path__.append(str(_root))

from fxprune.lowering.registration import register as _register_operators  # noqa: E402

_register_operators()  # before the modules that name torch.ops.fxprune

from fxprune.backend import gradient_report, hwprune, register  # noqa: E402
from fxprune.benchmark import benchmark  # noqa: E402
from fxprune.compiled import refresh  # noqa: E402
from fxprune.config import Config  # noqa: E402
from fxprune.explain import explain  # noqa: E402
from fxprune.gradients import gradient_clock  # noqa: E402
from fxprune.lowering.calibrate import calibrate  # noqa: E402
from fxprune.prune import PruneResult, prune  # noqa: E402
from fxprune.pruner import Pruner  # noqa: E402
from fxprune.schedules import CubicSchedule, IterativeSchedule, LinearSchedule, OneShotSchedule  # noqa: E402
from fxprune.sensitivity import sensitivity  # noqa: E402
from fxprune.verify import verify  # noqa: E402

__version__ = "0.1.0"
__all__ = [
    "Config",
    "CubicSchedule",
    "IterativeSchedule",
    "LinearSchedule",
    "OneShotSchedule",
    "PruneResult",
    "Pruner",
    "benchmark",
    "calibrate",
    "explain",
    "gradient_clock",
    "gradient_report",
    "hwprune",
    "prune",
    "refresh",
    "register",
    "sensitivity",
    "verify",
]
