"""What cross entropies share: the target is a distribution q over classes, and the gradient at the logits is p - q."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from torchcurv.curv.losses.formula import LabelFactor


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


def label_factor(p: Tensor, gradient: Tensor, counted: Tensor | None, tolerance: float) -> LabelFactor:
    """k for which a gradient [..., c] is k (p - y) for labels y: ± Σ |gradient| / Σ |p - y| over the rows that count.

    The negative k is taken where the positive one does not fit. Of two classes a gradient of either sign may be that of
    some labels, and so may that of rows whose p is 1 for a wrong class: there rounding decides which entry is larger.
    """
    positive, negative = (_label_factor(p, g, counted, tolerance) for g in (gradient, -gradient))
    swapped = negative.close & ~positive.close
    return LabelFactor(*(torch.where(swapped, x, y) for x, y in zip(_times(negative, -1.0), positive, strict=True)))


def _times(found: LabelFactor, sign: Tensor | float) -> LabelFactor:
    return found._replace(value=found.value * sign)


def _label_factor(p: Tensor, gradient: Tensor, counted: Tensor | None, tolerance: float) -> LabelFactor:
    """The positive one."""
    gap = _to_labels(p, gradient)
    if counted is not None:
        gap = gap * counted.unsqueeze(-1)
    size = gap.abs().sum()
    value = gradient.abs().sum() / size  # of the same units as reduction times factor
    # p is right to a rounding per row: with a thousand times that in all, k is right to a thousandth
    known = size > 1e3 * torch.finfo(p.dtype).eps * gradient[..., 0].numel()
    close = (gradient - value * gap).abs().amax() <= tolerance * value
    # Where p is uniform, labels smoothed by ε look like hard ones times 1 - ε. Above one half that is more likely.
    uniform = (p - 1 / p.shape[-1]).abs().amax() <= tolerance
    smoothed = uniform & (value > 0.5) & (value < 1) if p.shape[-1] > 1 else torch.zeros_like(known)
    known = known & torch.isfinite(value)
    alone = torch.zeros_like(close) if p.shape[-1] != 2 else close & ((gap.abs().sum(-1) > tolerance).sum() == 1)
    return LabelFactor(value, known, known & close & ~alone & ~smoothed, close, alone & known & ~smoothed)


def row_factors(p: Tensor, gradient: Tensor, tolerance: float) -> str | None:
    """Why rows [rows, c] seem to be k (p - y) for labels y and a k of their own each; None if they do not.

    Of two classes every gradient is of this form.
    """
    if p.shape[-1] < 3:
        return None
    most, least = gradient.amax(-1, keepdim=True), gradient.amin(-1, keepdim=True)
    sign = torch.where(most + least > tolerance * most.abs(), -1.0, 1.0)  # the larger entry is that of the label
    gap = _to_labels(p, sign * gradient)
    size = gap.abs().sum(-1, keepdim=True)
    kept = (size > tolerance).squeeze(-1) & torch.isfinite(gradient).all(-1)
    gradient, gap, size, sign = gradient[kept], gap[kept], size[kept], sign[kept]
    k = sign * gradient.abs().sum(-1, keepdim=True) / size
    uniform = (p[kept] - 1 / p.shape[-1]).abs().amax() <= tolerance if len(k) else True
    if len(k) < 2 or uniform or bool(((gradient - k * gap).abs() > tolerance * k.abs()).any()):
        return None
    low, high = float(k.amin()), float(k.amax())
    return (
        f"its terms seem to be multiplied by weights from {low:.4g} to {high:.4g}"
        if high - low > 0.01 * abs(high)
        else None
    )


def _to_labels(p: Tensor, gradient: Tensor) -> Tensor:
    """p - y for the labels y that a gradient shows, where it is negative. A row in which it is not is right and
    saturated: its label is the most probable class.

    The label is not looked up (`one_hot` reads the largest on the host).
    """
    label = torch.where(gradient.amin(-1) < 0, gradient.argmin(-1), p.argmax(-1))
    return p.scatter_add(-1, label.unsqueeze(-1), -torch.ones_like(p[..., :1]))


def moderated(f: Tensor, variance: Tensor) -> Tensor:
    """Logits whose logistic function (or softmax) is about the mean of that of N(f, variance).

    f / sqrt(1 + π/8 variance): MacKay, "The evidence framework applied to classification networks" (1992).
    """
    return f / (1 + math.pi / 8 * variance).sqrt()
