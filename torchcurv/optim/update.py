"""Update rules as pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

Number = float | Tensor


def kl_clip_factor(products: list[Tensor], kl_clip: float) -> Tensor:
    """ν = min(1, sqrt(κ / |Σ lr² <V, G>|)), V the preconditioned and G the raw gradient; a 0-d tensor, no sync.

    products: lr² <V, G> of each group. <V, G> = V^T (C + λ) V for Tikhonov damping, twice the KL divergence that
    a step V would cause.
    """
    total = torch.stack(products).sum().abs()
    return (kl_clip / total.clamp_min(torch.finfo(total.dtype).tiny)).sqrt().clamp_max(1)


def inner(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> as a 0-d tensor in the wider dtype."""
    y = y if y.dtype == x.dtype else y.to(x.dtype)
    return torch.dot(x.flatten(), y.flatten())


def momentum_(buffers: list[Tensor], directions: list[Tensor], momentum: float, nesterov: bool) -> list[Tensor]:
    """buffer <- momentum * buffer + direction, in place; returns the step: the buffer, or for Nesterov
    direction + momentum * buffer."""
    if not buffers:
        return []
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, directions)
    return list(torch._foreach_add(directions, buffers, alpha=momentum)) if nesterov else list(buffers)


def descend_(params: list[Tensor], steps: list[Tensor], lr: Number, weight_decay: float) -> None:
    """p <- (1 - lr * weight_decay) p - lr * step, in place."""
    if not params:
        return
    if weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    if isinstance(lr, Tensor):
        torch._foreach_sub_(params, torch._foreach_mul(steps, lr))
    else:
        torch._foreach_add_(params, steps, alpha=-lr)
