"""What the whole-model benchmarks run: models, batches, threads, types, sparsities and numbers of rounds, all fixed here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One model in one setting, and the number of rounds it is timed in."""

    model: str
    batch: int
    dtype: str = "float32"
    threads: int = 2
    rounds: int = 20

    @property
    def name(self) -> str:
        return f"{self.model}-b{self.batch}-{self.dtype}-{self.threads}t"

    @property
    def sparsity(self) -> dict[str, float]:
        return SPARSITY[self.model]

    @property
    def ignored(self) -> tuple[str, ...]:
        return ("pooler*",) if self.model.startswith("bert") else ()


SPARSITY: dict[str, dict[str, float]] = {
    "mobilenetv2_100": {"depthwise": 0.78, "pointwise": 0.62},
    "mobilenetv3_small_100": {"depthwise": 0.82, "pointwise": 0.70},
    "efficientnet_b0": {"depthwise": 0.85, "pointwise": 0.62},
    "convnext_tiny": {"depthwise": 0.78, "linear": 0.75},
    "bert_base": {"linear": 0.75},
    "resnet50": {"pointwise": 0.75, "conv": 0.75},
    "resnet18": {"pointwise": 0.75, "conv": 0.75},
    "bert_tiny": {"linear": 0.75},
}
MODELS = tuple(m for m in SPARSITY if m != "bert_tiny")
BATCHES = (1, 32, 8)
DTYPES = ("float32", "bfloat16")
_SLOW = ("convnext_tiny", "resnet50", "resnet18", "bert_base")
LEVELS = (0.0, 0.25, 0.5, 0.62, 0.75, 0.87)  # of the sweep, for every kind of layer


def cases(
    models: Sequence[str] = MODELS,
    batches: Sequence[int] = BATCHES,
    dtypes: Sequence[str] = DTYPES,
    threads: Sequence[int] = (2, 1),
) -> Iterator[Case]:
    """Yield the cases, those of the published goals first; BERT is not run at batch 32."""
    for count in threads:
        for batch in batches:
            for dtype in dtypes:
                for model in models:
                    if not (model == "bert_base" and batch == 32):
                        yield Case(model, batch, dtype, count, rounds(model, batch))


def rounds(model: str, batch: int) -> int:
    """Return the rounds of a case: fewer where a call takes long."""
    if batch == 1:
        return 20
    return 5 if model in _SLOW else 10
