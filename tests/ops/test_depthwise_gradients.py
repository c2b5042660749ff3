"""What the backward of depthwise_taps calls on a GPU gives what PyTorch's masked dense gradients give."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fxprune.ops import depthwise_taps
from tests.integers import generator, integers


def whole(args: tuple[Any, ...]) -> list[Any]:
    gen = generator(len(args))
    return [integers(gen, *a.shape) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


@pytest.mark.parametrize("number", range(len(list(depthwise_taps.samples()))))
def test_sparse_and_dense_gradients_agree(number: int) -> None:
    x, weight, taps, _, *window, _ = whole(list(depthwise_taps.samples())[number])
    grad = integers(generator(number), *depthwise_taps.fake(x, weight, taps, None, *window).shape)
    ctx = SimpleNamespace(kernel_size=window[0], stride=window[1], padding=window[2], dilation=window[3])
    sparse = depthwise_taps._sparse(ctx, grad, x, weight, taps, True, True)
    dense = depthwise_taps._dense(ctx, grad, x, weight, taps, True, True)
    for ours, theirs in zip(sparse, dense, strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs) and ours.any()
    assert depthwise_taps._sparse(ctx, grad, x, weight, taps, False, False) == (None, None)


def test_a_gpu_runs_the_sparse_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form follows the device of the gradient, also while it is traced on fake tensors."""
    seen = []
    sparse = depthwise_taps._sparse
    monkeypatch.setattr(depthwise_taps, "_sparse", lambda *args: seen.append(args[1].device.type) or sparse(*args))
    args = next(depthwise_taps.samples())
    for device in ("cuda", "cpu"):
        with FakeTensorMode(allow_non_fake_inputs=True):
            given = [torch.empty_like(a, device=device) if isinstance(a, Tensor) else a for a in args]
            ctx = SimpleNamespace(
                saved_tensors=given[:4], activation="none", needs_input_grad=[True] * 4, kernel_size=given[4],
                stride=given[5], padding=given[6], dilation=given[7],
            )  # fmt: skip
            y = depthwise_taps.fake(*given)
            gradients = depthwise_taps.backward(ctx, torch.empty_like(y))
        assert [g is None or g.shape == t.shape for g, t in zip(gradients[:4], given[:4], strict=True)] == [True] * 4
    assert seen == ["cuda"]
