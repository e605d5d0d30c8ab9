"""Update rules as pure functions of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Number = float | Tensor


def scale_within(size: Tensor, bound: float, largest: float = 1.0) -> Tensor:
    """min(largest, sqrt(bound / |size|)): what a step u is multiplied by, so that u^T M u <= bound, given size =
    u^T M u. A 0-d tensor, no sync.

    The KL clip has M = C + λ, where lr² <V, G> = u^T (C + λ) u for the step u = lr V of Tikhonov damping is twice the
    KL divergence that it would cause. A trust region δ of the second-order change ½ u^T C u is the bound 2 δ. Of a size
    that is not finite it is 0: a gradient is not finite then, and moves nothing.
    """
    scale = (bound / size.abs().clamp_min(torch.finfo(size.dtype).tiny)).sqrt().clamp_max(largest)
    return torch.where(torch.isfinite(size), scale, 0)


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


def dot(x: dict[Tensor, Tensor], y: dict[Tensor, Tensor], weights: dict[Tensor, Number] | None = None) -> Tensor:
    """Σ_p w_p <x_p, y_p> over the parameters that both have."""
    terms = [inner(x[p], y[p]) * (1.0 if weights is None else weights[p]) for p in x if p in y]
    return torch.stack(terms).sum() if terms else next(iter(x.values())).new_zeros(())


def norm_of(tensors: list[Tensor]) -> Tensor:
    """The norm of all together, in float32 or better; of sharded ones (DTensor) that of their wholes, which all their
    processes must ask for."""
    dense = [x.coalesce().values() if x.is_sparse else x for x in tensors]
    norms = [x.to(torch.promote_types(x.dtype, torch.float32)).norm() for x in dense]
    return torch.stack([x.full_tensor() if hasattr(x, "full_tensor") else x for x in norms]).norm()


def levenberg_marquardt(actual: float, predicted: float, omega: float, noise: float = 0.0) -> float:
    """What the damping is multiplied by, given how a step has changed the loss and how a quadratic model said it would:
    1/ω for ρ = actual / predicted < ¼, NaN, or where the model itself rises; ω for ρ > ¾; else 1.

    noise: changes up to this, from rounding, say nothing. Source of ¼ and ¾: Martens, Grosse, "Optimizing neural
    networks with Kronecker-factored approximate curvature" (2015), section 6.5.
    """
    if abs(predicted) <= noise and abs(actual) <= noise:
        return 1.0
    if not predicted < 0 or not actual / predicted >= 0.25:
        return 1 / omega
    return omega if actual / predicted > 0.75 else 1.0


def trust_ratio(p: Tensor, step: Tensor) -> Tensor:
    """norm(p) / norm(step) where norm(p) > 1e-2, else 1: a bias that starts at zero could not grow."""
    size, length = p.norm(), step.norm()
    tiny = torch.finfo(length.dtype).tiny
    return torch.where((size > 1e-2) & (length > 0), size.to(length.dtype) / length.clamp_min(tiny), 1.0)


def normalise_(params: list[Tensor]) -> None:
    """p <- sqrt(2 o) p / norm(p) for p [o, ...] of two or more dimensions, in place; zero stays zero."""
    for p in params:
        if p.dim() > 1:
            norm = p.norm()
            p.mul_(torch.where(norm > 0, math.sqrt(2 * p.shape[0]) / norm, 1.0))
