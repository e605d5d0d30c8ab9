"""Models of timm train with nothing said but the loss; one step of "full" is the dense one."""

import importlib.util

import pytest
from torch import nn

if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)
from full_step import error_of_full
from timm_models import MODELS, made, trained

pytestmark = pytest.mark.filterwarnings("ignore:Overwriting .* in registry:UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_untouched(name):
    model, optimizer, losses = trained(name)
    assert losses[-1] < losses[0] and all(p.isfinite().all() for p in model.parameters())
    assert optimizer.coverage() == 1.0


FULL = [
    "resnet18", "seresnet18", "resnetv2_50", "convnext_atto", "convnextv2_atto", "test_efficientnet", "test_nfnet",
    "densenet121", "vit_tiny_patch16_224", "deit3_small_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224",
    "cait_xxs24_224", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "xcit_nano_12_p16_224",
]  # fmt: skip


@pytest.mark.parametrize("name", FULL)
def test_a_step_of_full_is_the_dense_one(name):
    model, x, y = made(name)
    model, x, loss_fn = model.double().eval(), x.double(), nn.CrossEntropyLoss()
    assert error_of_full(model, lambda: loss_fn(model(x), y), lambda: model(x), loss_fn=loss_fn) <= 1e-9
