"""The KL clip: one bound on the length of all preconditioned steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.checks import check_number
from torchcurv.optim.engine.damping import is_of_the_loss
from torchcurv.optim.update import inner, scale_within


def checked_kl_clip(kl_clip: Any, auto: float | None = 1.0) -> float | None:
    """κ; auto: what "auto" stands for."""
    if kl_clip == "auto":
        return auto
    if kl_clip is not None:
        check_number("kl_clip", kl_clip, lambda x: x > 0, 'a number > 0, or None for no clipping, or "auto"')
    return kl_clip


def kl_clip(
    groups: Iterable[dict[str, Any]], gradients: dict[Tensor, Tensor], solved: dict[Tensor, Tensor], bound: float | None
) -> dict[str, Tensor]:
    """size: Σ lr² <V, g> over preconditioned steps V in units of the loss, and clip: the factor ν that keeps it below
    the bound, one number for all of them. Empty where there is no bound, or nothing to clip."""
    if bound is None or not solved:
        return {}
    products = []
    for group in groups:
        clipped = group["params"] if is_of_the_loss(group) else []
        own = [inner(solved[p], gradients[p]) for p in clipped if p in solved]
        if own:
            products.append(torch.stack(own).sum() * group["lr"] ** 2)
    if not products:
        return {}
    size = torch.stack(products).sum()
    return {"size": size, "clip": scale_within(size, bound)}
