"""Small models of timm, made without weights: one row each.

timm asks for torchvision, of which there is no build for a torch without CUDA at the time of writing. What timm takes
from it when it is imported are readers and transforms of images, which no model here needs: empty modules stand in
for it where it is not installed, and are gone when timm is there.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from torch import nn

from torchcurv import SecondOrderOptimizer

PARTS = (
    "", ".transforms", ".transforms.functional", ".datasets", ".datasets.folder", ".ops", ".ops.misc", ".models",
    ".models.feature_extraction", ".io",
)  # fmt: skip


class _Interpolation(enum.Enum):
    NEAREST, BILINEAR, BICUBIC, BOX, HAMMING, LANCZOS = "nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"


class _Empty(types.ModuleType):
    InterpolationMode = _Interpolation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@contextmanager
def _stand_in() -> Iterator[None]:
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    names = [f"torchvision{part}" for part in PARTS]
    for name in names:
        module = sys.modules[name] = _Empty(name)
        module.__spec__, module.__path__ = ModuleSpec(name, None), []
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


with _stand_in():
    import timm

CLASSES, BATCH = 3, 4
TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
STAGES: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}
WINDOWS: dict[str, Any] = {
    "img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2),
}  # fmt: skip
RESNET: dict[str, Any] = {"layers": (1, 1, 1, 1), "channels": (8, 12, 16, 24), "stem_width": 8}
MODELS: dict[str, tuple[int, dict[str, Any]]] = {  # the size of the images, and what is smaller than usual
    "resnet18": (32, RESNET),
    "resnet50d": (32, RESNET),
    "seresnet18": (32, RESNET),
    "resnetv2_50": (32, {"layers": (1, 1, 1, 1), "channels": (16, 16, 32, 32), "stem_chs": 8}),
    "test_resnet": (32, {}),
    "test_byobnet": (32, {}),
    "convnext_atto": (32, STAGES),
    "convnextv2_atto": (32, STAGES),
    "test_convnext": (32, {}),
    "test_efficientnet": (32, {}),
    "test_efficientnet_gn": (32, {}),
    "test_efficientnet_ln": (32, {}),
    "test_efficientnet_evos": (32, {}),
    "tf_mobilenetv3_small_minimal_100": (32, {"drop_rate": 0.0}),
    "mobilenetv3_small_050": (32, {"drop_rate": 0.0}),
    "regnety_002": (32, {}),
    "test_nfnet": (32, {}),
    "densenet121": (32, {"growth_rate": 4, "block_config": (1, 1, 1, 1)}),
    "vit_tiny_patch16_224": (32, TINY),
    "deit3_small_patch16_224": (32, TINY),
    "beit_base_patch16_224": (32, TINY),
    "eva02_tiny_patch14_224": (32, {**TINY, "num_heads": 3}),
    "cait_xxs24_224": (32, TINY),
    "swin_tiny_patch4_window7_224": (32, WINDOWS),
    "swinv2_tiny_window8_256": (32, WINDOWS),
    "xcit_nano_12_p16_224": (32, {**TINY, "patch_size": 16}),
    "test_mambaout": (32, {}),
}


def made(name: str, batch: int = BATCH) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(the model, images, labels)."""
    torch.manual_seed(0)
    size, smaller = MODELS[name]
    model = timm.create_model(name, num_classes=CLASSES, **smaller)
    return model, torch.randn(batch, 3, size, size), torch.arange(batch) % CLASSES


def trained(name: str, steps: int = 8) -> tuple[nn.Module, Any, list[float]]:
    """(the model, its optimizer, the loss of each step) with nothing said but the loss."""
    model, x, y = made(name)
    loss_fn = nn.CrossEntropyLoss()
    optimizer, losses = SecondOrderOptimizer(model.train(), loss_fn=loss_fn), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, optimizer, losses
