"""Pruned models compiled on a GPU give what the masked dense model gives, through the CUDA kernels."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.oracle import FORCED


def pair(c: int, out: int, kernel: int, stride: int) -> list[nn.Module]:
    depthwise = nn.Conv2d(c, c, kernel, stride, kernel // 2, groups=c, bias=False)
    return [depthwise, nn.BatchNorm2d(c), nn.ReLU6(), nn.Conv2d(c, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU6()]


class Separable(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*pair(64, 128, 3, 1), *pair(128, 128, 5, 2), *pair(128, 256, 7, 1), nn.AdaptiveAvgPool2d(1))


class Excited(nn.Module):
    """Depthwise, squeeze-and-excite, 1x1: the depthwise kernel pools, the GEMM takes the gate; and a 3x3 convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(64, 128, 3, 2, 1), nn.Conv2d(128, 128, 5, 1, 2, groups=128)
        self.squeeze, self.excite, self.project = nn.Conv2d(128, 32, 1), nn.Conv2d(32, 128, 1), nn.Conv2d(128, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.silu(self.depthwise(nn.functional.silu(self.stem(x))))
        gate = torch.sigmoid(self.excite(nn.functional.silu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        return self.project(y * gate)


class Feed(nn.Module):
    """A transformer's feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(256), nn.Linear(256, 1024), nn.Linear(1024, 256)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


pytestmark = pytest.mark.slow
CASES = (
    ("separable", Separable, (8, 64, 28, 28)), ("excited", Excited, (8, 64, 28, 28)), ("feed", Feed, (4, 128, 256)),
)  # fmt: skip


# pairs are fused only where fusing may be measured; Inductor and its graphs once, they take the time
@pytest.mark.parametrize(
    ("fallback", "mode", "autotune"), (("eager", "", "off"), ("eager", "", "fast"), ("inductor", "reduce-overhead", "fast"))
)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize(("name", "build", "shape"), CASES, ids=[c[0] for c in CASES])
def test_compiled_equals_masked_dense(
    name: str,
    build: type[nn.Module],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    fallback: str,
    mode: str,
    autotune: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # by default convolutions may use it
    if fallback == "inductor" and dtype == torch.float16:
        pytest.skip("as in bfloat16")
    torch.manual_seed(0)
    model = build().eval()
    model = fxprune.prune(model, (torch.randn(1, *shape[1:]),), sparsity=0.6).model.cuda().to(dtype)
    x = torch.randn(shape, device="cuda", dtype=dtype)
    torch._dynamo.reset()
    chosen = {
        **FORCED,
        "autotune": autotune,
        "require_sparse": True,
        "fallback": fallback,
        **({"mode": mode} if mode else {}),
    }
    fast = torch.compile(model, backend="hwprune", options=chosen)
    with torch.no_grad():
        expected, exact = model(x), copy.deepcopy(model).double()(x.double())
        for _ in range(3):
            got = fast(x).clone()
    ours, theirs = ((y.double() - exact).abs().max().item() for y in (got, expected))
    scale = exact.abs().max().item()
    assert ours <= 2 * theirs + 1e-6 * scale, f"{name}: {ours:.3g} from fp64, dense {theirs:.3g}"


@pytest.fixture
def tf32() -> Iterator[None]:
    """For matrices too; convolutions may use it by default."""
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("name", "build", "shape"), CASES, ids=[c[0] for c in CASES])
def test_compiled_in_tf32(name: str, build: type[nn.Module], shape: tuple[int, ...], tf32: None) -> None:
    """Ten bits of each operand are left; cuDNN need not choose TF32 where it may, so its error is no measure of ours."""
    torch.manual_seed(0)
    model = fxprune.prune(build().eval(), (torch.randn(1, *shape[1:]),), sparsity=0.6).model.cuda()
    x = torch.randn(shape, device="cuda")
    torch._dynamo.reset()
    fast = torch.compile(model, backend="hwprune", options={**FORCED, "require_sparse": True})
    with torch.no_grad():
        got, exact = fast(x), copy.deepcopy(model).double()(x.double())
    assert (got.double() - exact).abs().max().item() <= 5e-3 * exact.abs().max().item(), name
