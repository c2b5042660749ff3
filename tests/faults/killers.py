"""The existing tests that must fail under a planted fault, each as a call without arguments."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fxprune.allocate import Group, Level
from tests import test_allocate, test_errors, test_plan, test_prune, test_verify
from tests.backend import (
    conftest,
    test_element_patterns,
    test_graphs,
    test_lifetimes,
    test_modes,
    test_never_slower,
    test_options,
    test_training,
    test_weights_change,
)
from tests.lowering import test_region
from tests.passes import (
    test_fold_batchnorm,
    test_fuse_epilogue,
    test_fuse_gate,
    test_fuse_transpose,
    test_match_depthwise,
    test_normalize,
    test_rewrite_conv,
    test_rewrite_depthwise,
    test_rewrite_gemm,
    test_shrink,
)


def every(test: Callable[..., None], *tables: Any) -> Callable[[], None]:
    """Run a parametrized test over its tables."""

    def run() -> None:
        cases: list[tuple[Any, ...]] = [()]
        for table in tables:
            cases = [(*case, value) for case in cases for value in table]
        for case in cases:
            test(*case)

    return run


def with_patches(test: Callable[..., None], *args: Any) -> Callable[[], None]:
    """Run a test that takes ``tmp_path`` and ``monkeypatch``."""

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            test(Path(folder), patch, *args)

    return run


def with_clock(test: Callable[..., None], *args: Any) -> Callable[[], None]:
    """Run a test that takes the ``timed`` fixture."""

    def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            test(test_never_slower.timed.__wrapped__(patch), *args)  # type: ignore[attr-defined]

    return run


def uncut(killer: Callable[[], None]) -> Callable[[], None]:
    """Run a test under the ``uncut`` fixture: no channel leaves the graph."""

    def run() -> None:
        with pytest.MonkeyPatch.context() as patch:
            conftest.uncut.__wrapped__(patch)  # type: ignore[attr-defined]
            killer()

    return run


def one_example(test: Callable[..., None], *args: Any) -> Callable[[], None]:
    """Run a property test on one example: shrinking a planted fault takes minutes."""
    return lambda: test.hypothesis.inner_test(*args)  # type: ignore[attr-defined]


linear = every(test_graphs.test_output_form, ["tuple"])
mobile = every(test_modes.test_input_layout, ["contiguous"])
other_dtypes = every(test_modes.test_other_dtypes_stay_dense, [torch.float64])
tied = test_modes.test_a_weight_tied_to_an_embedding_is_not_pruned
windows = one_example(test_rewrite_depthwise.test_every_window_and_layout, 8, 9, 9, 3, 2, 2, True, "contiguous", 3)
pointwise = one_example(test_rewrite_gemm.test_every_pointwise, 16, 8, 7, 2, True, "contiguous", 3)
depthwise = every(test_match_depthwise.test_every_window_is_found_with_its_geometry, test_match_depthwise.WINDOWS)
epilogue_twins = every(test_fuse_epilogue.test_twin_fuses_only_what_is_right, ["pointwise"], test_fuse_epilogue.TWINS)
fold_twins = every(test_fold_batchnorm.test_twin_does_not_fold, test_fold_batchnorm.TWINS)
gate_twins = every(test_fuse_gate.test_twin_does_not_fuse, test_fuse_gate.TWINS)
transpose_twins = every(test_fuse_transpose.test_twin_keeps_its_permutes, test_fuse_transpose.TWINS)
updated = every(test_weights_change.test_change_is_seen, ["in place"])
two_models = test_weights_change.test_two_models_of_one_class_keep_their_own_weights
outlived = test_lifetimes.test_another_model_of_the_class_runs_after_the_first_is_gone
grown = uncut(every(test_weights_change.test_change_is_seen, ["support grows"]))
fused = every(test_weights_change.test_change_is_seen, ["Adam fused"])
renamed = test_weights_change.test_a_rebuild_knows_names_and_folds_batchnorm
gradients = every(test_training.test_gradients_are_those_of_the_masked_model, ["conv"], [0.5])
found_zeros = test_training.test_found_zeros_are_no_mask_in_training
held = every(test_training.test_hold_keeps_zeros_zero, ["SGD momentum"])
importance = test_prune.test_importance_is_what_is_kept
ties = test_prune.test_ties_are_deterministic_and_go_to_the_lower_index
achieved = every(test_prune.test_achieved_sparsity_is_within_half_a_point, [0.5], ["layer"])
ignored = test_prune.test_ignored_layers_and_filter_fn
copied = test_prune.test_a_copy_unless_in_place
flags = test_prune.test_flags_statistics_and_gradients_survive
masks = test_plan.test_masks_are_the_zeros_of_the_weights
corrupted = every(test_errors.test_class_and_message, ["PackedFormatError"])
refused = every(test_options.test_illegal_value_names_option_and_expectation, ["sparsity"], [1.0])
losers = uncut(with_clock(test_never_slower.test_a_loser_leaves_nothing_sparse_in_the_graph))
regions = uncut(with_clock(test_never_slower.test_a_region_wins_or_loses_as_a_whole))
shapes_timed = uncut(with_patches(test_never_slower.test_another_shape_or_thread_count_is_measured_anew))
broken_cache = uncut(with_patches(test_never_slower.test_a_corrupted_cache_is_ignored_and_replaced, '{"a": [1, 2]}'))
mutations = [test_normalize.mutated_and_read, test_normalize.view_then_mutated, test_normalize.iadd_with_reader]
normalize_twins = every(test_normalize.test_a_visible_mutation_keeps_its_meaning, mutations)
lived = test_region.test_a_value_lives_until_its_last_reader
written = every(test_region.test_a_write_closes_the_region, [test_region.add_])
channels = test_shrink.test_silent_filters_go_with_their_columns
scattered = every(test_element_patterns.test_planned_and_compiled, ["linear"], ["unstructured"])
# a width at which one more pixel of padding leaves the shape of the result as it is
conv_windows = one_example(test_rewrite_conv.test_every_window, 8, 1, 2, 3, (1, 3), (2, 1), True, "contiguous", 3)
tight = [Group(((Level(5, 1.0), Level(2, 0.5)),), dense=Level(9, 2.0))]
knapsack = one_example(test_allocate.test_nothing_that_fits_is_better, tight, 4)
verified = every(test_verify.test_a_wrong_model_is_caught, ["values"])
