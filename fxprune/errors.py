"""Every mistake a user can make, one class each; the message template lives on the class.

A message says what was given, what was expected and what to do. Templates are filled by keyword,
so tests and the documentation can rely on them.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class FxPruneWarning(UserWarning):
    """Base of every warning fxprune emits, so that tests can turn them into errors."""


class ComputedWeight(FxPruneWarning):
    """A layer is not pruned, because its weight is not a Parameter: a mask or a parametrization computes it."""


class TargetNotReached(FxPruneWarning):
    """A target speed-up or latency was not reached; what came closest is returned."""

    def __init__(self, speed: object) -> None:
        super().__init__(
            f"TargetNotReached: {speed}. The fastest plan found is returned. Allow more with max_sparsity=, fewer "
            "ignored_layers or a pattern for more kinds, or ask for less."
        )


class NoGradientPruned(FxPruneWarning):
    """``grad_sparsity`` was asked for and no layer of a graph that trains takes part."""

    def __init__(self, ratio: object, layers: object) -> None:
        super().__init__(
            f"NoGradientPruned: grad_sparsity={str(ratio)!r} prunes nothing in this graph: {layers or 'it holds no layer'}. "
            "Leave the option out, or compile a model whose convolutions and linear layers pass a gradient on."
        )


class NotScored(FxPruneWarning):
    """Layers keep their masks in a pruning round, because no gradient reached them in the steps that score."""

    def __init__(self, names: Sequence[str], window: int) -> None:
        listed = ", ".join(map(repr, names[:3])) + (", ..." if len(names) > 3 else "")
        super().__init__(
            f"NotScored: importance='taylor' saw no gradient of {listed} in the {window} steps before this round. What is "
            "frozen or unused keeps the mask it has; to have no warning, name it in ignored_layers=."
        )


class FxPruneError(Exception):
    """Base of every error fxprune raises. ``where`` is appended in brackets when given."""

    template = "{message}"

    def __init__(self, *, where: str | None = None, **fields: object) -> None:
        self.fields = fields
        text = f"{type(self).__name__}: {self.template.format(**fields)}"
        super().__init__(f"{text} [{where}]" if where else text)


class ConfigError(FxPruneError, ValueError):
    """An option has an illegal value."""

    template = "option {name!r} got {given!r}; expected {expected}."


class UnknownOption(FxPruneError, TypeError):
    """An option does not exist."""

    template = "unknown option {name!r}; did you mean {nearest!r}? Legal options: {legal}."


class UnknownPattern(FxPruneError, ValueError):
    """A sparsity pattern does not exist or does not apply to the kind of layer."""

    template = "unknown pattern {name!r}{context}; did you mean {nearest!r}? Legal patterns: {legal}."


class UnknownLayer(FxPruneError, ValueError):
    """A layer name or glob matches nothing in the model."""

    template = (
        "{name!r} in {option} matches no kind and no prunable layer; did you mean {nearest!r}? "
        "Kinds: {kinds}. Run fxprune.explain(model, example_inputs) for the layers."
    )


class TileMismatch(FxPruneError, ValueError):
    """A weight cannot be cut into the requested tiles."""

    template = "weight {shape} cannot be tiled by granularity {granularity}: {reason}. {remedy}"


class PackedFormatError(FxPruneError, ValueError):
    """A packed weight breaks the format; it never reaches a kernel."""

    template = "{what}: got {given}, expected {expected} (the packed weight is corrupt or not ours)."


class PlanFileError(FxPruneError, ValueError):
    """A plan file is damaged, of another version or not a plan; nothing of it is used."""

    template = "{path}: {what}: got {given}, expected {expected}. Save the plan again with plan.save(path)."


class PlanMismatch(FxPruneError, ValueError):
    """A plan names parameters that the model does not have, or has with another shape; the model is not changed."""

    template = (
        "the plan does not fit the model: {count} of {total} parameter(s): {what}. Apply it to the model it was made for, "
        "under the same names."
    )


class ExportFileError(FxPruneError, ValueError):
    """An exported file cannot be loaded here: it is not ours, of another version, or needs what is not installed."""

    template = "{path} cannot be loaded: {reason}. Export the model again with fxprune.export."


class MissingPackage(FxPruneError, ImportError):
    """Something was asked for that needs a package which is not installed; fxprune itself does not need it."""

    template = "{what} needs {packages}, which is not installed. Run: pip install 'fxprune[{extra}]'."


class ModelSpecError(FxPruneError, ValueError):
    """The command line names a model that cannot be built."""

    template = "model {spec!r}: {reason}. Known forms: {forms}."


class NothingToPrune(FxPruneError, ValueError):
    """The captured graphs hold no layer that the request applies to."""

    template = "no layer to prune: {reason}. {remedy}"


class CaptureError(FxPruneError, RuntimeError):
    """The model could not be run on the example inputs while it was captured."""

    template = "the model could not be captured on example_inputs {inputs}: {cause}. {remedy}"


class NonFiniteWeight(FxPruneError, ValueError):
    """A weight to be pruned holds NaN or Inf, so magnitudes do not rank it."""

    template = (
        "weight {name!r} holds {count} non-finite values, so it cannot be ranked. Repair the "
        "weight or exclude the layer with ignored_layers=({name!r},)."
    )


class MissingCalibration(FxPruneError, ValueError):
    """An option needs calibration data and none was given; ``torch.compile`` and ``explain`` take none."""

    template = (
        "{option} needs calibration data. Pass calibration=[batch, ...] to fxprune.prune, each batch what the model "
        "takes; for 'taylor' also loss_fn=, with batches (inputs, targets). Inside torch.compile use 'magnitude', "
        "'l2' or 'random', or prune first."
    )


class CalibrationError(FxPruneError, ValueError):
    """The calibration data do not fit the model or the request."""

    template = "the calibration data cannot be used: {reason}. {remedy}"


class DropTooLarge(FxPruneError, ValueError):
    """Even the lowest sparsity that was tried costs more than ``max_drop``."""

    template = (
        "no sparsity keeps eval_fn within max_drop={max_drop}: dense {dense:.6g}, and {metric:.6g} at {scale:.1%} of the "
        "sparsity asked for, the least tried. Raise max_drop, or exclude layers that fxprune.sensitivity names."
    )


class WrongOptimizer(FxPruneError, RuntimeError):
    """The optimizer that steps holds none of the parameters a Pruner prunes."""

    template = (
        "the optimizer that stepped holds none of the {count} parameters to prune (such as {name!r}); they may have been "
        "replaced after it was made. Create the optimizer after the model was moved, converted or sharded."
    )


class StateMismatch(FxPruneError, ValueError):
    """A Pruner's saved state does not fit the model or the request."""

    template = "the saved state of a Pruner cannot be loaded: {what}: got {given}, expected {expected}."


class NotLowered(FxPruneError, RuntimeError):
    """A semantic operator has no implementation that supports it."""

    template = "{op}: no implementation supports it: {reasons}."


class RequireSparse(FxPruneError, RuntimeError):
    """``require_sparse=True`` and a pruned layer stays dense."""

    template = "require_sparse=True, but {count} pruned layer(s) stay dense: {layers}."


class VerificationError(FxPruneError, AssertionError):
    """A compiled or rewritten graph does not compute what it should."""

    template = "{stage}: {what}: got {given}, expected {expected}."


def nearest(name: str, legal: Iterable[str]) -> str:
    """Return the legal word closest to ``name`` (the first one when nothing is close)."""
    words = list(legal)
    return (difflib.get_close_matches(name, words, n=1, cutoff=0.0) or words or ["?"])[0]
