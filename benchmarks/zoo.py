"""The models the benchmarks, the demo and the conformance tests run: random weights, sane activations.

Weights come from a fixed seed and nothing is downloaded. BatchNorm statistics are measured on random batches, because
with the initial ones activations grow or vanish with depth and a comparison of outputs would prove nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from cases import Case
from torch import Tensor, nn

Inputs = tuple[Tensor, ...]

LARGE = ("convnext_base",)  # of the GPU benchmark alone
VISION = ("mobilenetv2_100", "mobilenetv3_small_100", "efficientnet_b0", "convnext_tiny", "resnet18")
# name -> BertConfig fields that differ from BERT base, and tokens
BERT: dict[str, tuple[dict[str, Any], int]] = {
    "bert_base": ({}, 128),
    "bert_6": ({"num_hidden_layers": 6}, 128),
    "bert_tiny": (
        {
            "num_hidden_layers": 2,
            "hidden_size": 128,
            "num_attention_heads": 2,
            "intermediate_size": 512,
            "vocab_size": 1000,
        },
        32,
    ),
}
# the conformance tests alone: timm's names -> options of create_model, transformers' models -> configuration fields
TIMM: dict[str, dict[str, Any]] = {
    "ghostnet_100": {},
    "mobilenetv1_100": {},
    "mobilenetv3_large_100": {},
    "mobilevit_s": {},
    "regnetx_004": {},
    "resnet50": {},
    "vgg16": {"mlp_ratio": 0.125},
}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "ConvNextModel": {"hidden_sizes": [48, 96, 192, 384], "depths": [2, 2, 2, 2], "layer_scale_init_value": 0.3},
    "DistilBertModel": {"n_layers": 2, "dim": 128, "n_heads": 2, "hidden_dim": 512, "vocab_size": 1000},
    "MobileNetV2Model": {},
    "SegformerModel": {},
    "ViTModel": {
        "num_hidden_layers": 2,
        "hidden_size": 128,
        "num_attention_heads": 2,
        "intermediate_size": 512,
        "image_size": 64,
    },
}
NAMES = (*VISION, *LARGE, *BERT, *TIMM, *TRANSFORMERS)


def build(name: str, seed: int = 0) -> tuple[nn.Module, Callable[[int], Inputs]]:
    """Return ``(model in evaluation mode, batch -> positional arguments)``; images are (batch, 3, 224, 224)."""
    if name not in NAMES:
        raise ValueError(f"unknown model {name!r}; one of {', '.join(NAMES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name in TRANSFORMERS:
            return _transformer(name)
        return _bert(name) if name in BERT else _vision(name)


def prepared(case: Case) -> tuple[nn.Module, Inputs]:
    """Return the model of a benchmark's case in its type, and inputs of its batch."""
    model, inputs = build(case.model)
    dtype = getattr(torch, case.dtype)
    return model.to(dtype), tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs(case.batch))


def _vision(name: str) -> tuple[nn.Module, Callable[[int], Inputs]]:
    with torchvision_absent():
        import timm

        # ConvNeXt starts with a layer scale of 1e-6, which would hide every block from the output
        options = {"ls_init_value": 0.3} if name.startswith("convnext") else TIMM.get(name, {})
        if name.startswith("resnet"):  # nor zeros, the scale of the last BatchNorm of each block
            options = {**options, "zero_init_last": False}
        model = timm.create_model(name, pretrained=False, **options).eval()
    calibrate(model, [torch.randn(4, 3, 224, 224) for _ in range(4)])
    return model, images


def images(batch: int) -> Inputs:
    """Return one seeded batch of random images."""
    return (torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(1)),)


def _bert(name: str) -> tuple[nn.Module, Callable[[int], Inputs]]:
    from transformers import BertConfig, BertModel

    fields, length = BERT[name]
    config = BertConfig(**fields, attn_implementation="sdpa", return_dict=False)
    model = BertModel(config).eval()

    def tokens(batch: int) -> Inputs:
        generator = torch.Generator().manual_seed(1)
        return (torch.randint(config.vocab_size, (batch, length), generator=generator),)

    return model, tokens


def _transformer(name: str) -> tuple[nn.Module, Callable[[int], Inputs]]:
    """A small model of transformers; images are (batch, 3, 64, 64)."""
    import transformers

    cls = getattr(transformers, name)
    model = cls(cls.config_class(**TRANSFORMERS[name])).eval()
    if name == "DistilBertModel":
        return model, lambda batch: (torch.randint(1000, (batch, 16), generator=torch.Generator().manual_seed(1)),)
    calibrate(model, [torch.randn(8, 3, 64, 64) for _ in range(2)])
    return model, lambda batch: tuple(t[..., :64, :64] for t in images(batch))


@torch.no_grad()
def calibrate(model: nn.Module, batches: Sequence[Tensor]) -> None:
    """Set BatchNorm's running statistics to the averages over ``batches``; the model ends in evaluation mode."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    for batch in batches:
        model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


@contextmanager
def torchvision_absent() -> Iterator[None]:
    """Let ``import timm`` succeed where torchvision is not installed: its names resolve, calling them does nothing.

    timm imports torchvision for image transforms, which random inputs do not need. On exit the stand-in is gone, so
    that other libraries see that torchvision is missing.
    """
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[module]


class _Name(type):
    """A class whose attributes are strings, so that enumerations of torchvision can be read."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return (lambda *args, **kwargs: None) if name[:1].islower() else _Name(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        mine = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if mine else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None
