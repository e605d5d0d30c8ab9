"""What cross entropies share: the target is a distribution q over classes, and the gradient at the logits is p - q."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def misfit(p: Tensor, gradient: Tensor, tolerance: float) -> str | None:
    """Why a gradient [rows, c] is not p - q of distributions q; None if it may be.

    Of a factor c < 1 it is p - q too, q = (1-c) p + c y, which is told from smoothed labels by its ratios.
    """
    q = p - gradient
    fits = (q.amin(-1) >= -tolerance) & ((q.sum(-1) - 1).abs() <= tolerance)
    if not bool((fits | ~torch.isfinite(gradient).all(-1)).all()):
        return "it would say of some class that its probability in the target is below 0 or above 1"
    factor = _shrunk(p, gradient)
    return None if factor is None else f"the loss seems to be multiplied by {factor:.4g}"


def _shrunk(p: Tensor, gradient: Tensor) -> float | None:
    """c if gradient = c (p - y) for labels y and c < 1, beyond what smoothed labels could imitate; else None.

    For labels smoothed by 1 - c the ratios gradient / p would spread like (1 - c) / (C p); for a factor they do not.
    """
    labels = F.one_hot(gradient.argmin(-1), p.shape[-1]).bool()
    kept = ~labels & (p > 1e-6)  # below it, the rounding of float32 outweighs what the ratio says
    ratio, spread = (gradient / p)[kept], (1 / (p.shape[-1] * p))[kept]
    if len(ratio) < 2:
        return None
    c = float(ratio.mean())
    imitation = (1 - c) * float(spread.std())
    # a tenth of the spread that smoothing would have: far from it on both sides; factors above 0.99 change little
    return c if c < 0.99 and float((ratio - c).abs().max()) < 0.1 * imitation else None


def moderated(f: Tensor, variance: Tensor) -> Tensor:
    """Logits whose logistic function (or softmax) is about the mean of that of N(f, variance).

    f / sqrt(1 + π/8 variance): MacKay, "The evidence framework applied to classification networks" (1992).
    """
    return f / (1 + math.pi / 8 * variance).sqrt()
