"""Cross entropy of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.losses.distributions import label_factor, misfit, moderated, row_factors
from torchcurv.curv.losses.formula import LabelFactor, Layout, LossFormula, Target, one_hot


class CrossEntropy(LossFormula):
    """c = -sum_k y_k log p_k, p = softmax(f); H = diag(p) - p p^T, S = sqrt(p_k) (e_k - p) in column k.

    With the weights w_k of the classes the loss is y·w times that of the target y_k w_k / y·w.

    of_log_probabilities: nll, the loss of f = log p. It is the same: softmax(log p) = p, and the columns of S sum to
    zero over the classes, which log_softmax passes back unchanged. Only the gradient that arrives at f differs, -y.
    """

    name = "cross_entropy"
    hessian_needs_target = False
    options = ("weight", "ignore_index", "label_smoothing")

    def __init__(self, of_log_probabilities: bool = False) -> None:
        self.of_log_probabilities = of_log_probabilities

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        return -torch.where(y == 0, 0, y * f.log_softmax(-1)).sum(-1)

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        return f.softmax(-1) - y

    def arriving_gradient(self, f: Tensor, y: Tensor) -> Tensor:
        return self._p(f) - y

    def root(self, f: Tensor, y: Any, v: Tensor) -> Tensor:
        """sqrt(p) v - p (sqrt(p) · v)."""
        p = f.softmax(-1)
        u = p.sqrt() * v
        return u - p * u.sum(-1, keepdim=True)

    def column(self, f: Tensor, y: Any, k: int) -> Tensor:
        p = f.softmax(-1)
        column = -p * p[..., k : k + 1].sqrt()
        column[..., k] += p[..., k].sqrt()
        return column

    def hessian(self, f: Tensor, y: Any, v: Tensor) -> Tensor:
        p = f.softmax(-1)
        return p * v - p * (p * v).sum(-1, keepdim=True)

    def hessian_diagonal(self, f: Tensor, y: Any) -> Tensor:
        p = f.softmax(-1)
        return p - p.square()

    def label_gradient(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        p = f.softmax(-1)
        sure = torch.where(torch.isfinite(p), p, 1)  # multinomial raises on others; the gradient stays not finite
        drawn = torch.multinomial(sure.flatten(0, -2), 1, generator=generator).reshape(*p.shape[:-1], 1)
        return p.scatter_add(-1, drawn, -torch.ones_like(p[..., :1]))

    def read(self, f: Tensor, target: Tensor, layout: Layout, options: Mapping[str, Any]) -> Target:
        """Labels, or probabilities in the shape of the output; ignored labels are terms of weight 0."""
        n, t, c = f.shape
        class_weight, smoothing = options.get("weight"), options.get("label_smoothing", 0.0)
        class_weight = None if class_weight is None else class_weight.to(f.dtype)
        labels = mask = None
        if target.is_floating_point():
            given = layout(target)
        else:
            labels = target.reshape(n, t)
            kept = labels != options.get("ignore_index", -100)
            labels, mask = labels.where(kept, 0), kept.to(f.dtype)

        def smoothed() -> Tensor:
            hard = given if labels is None else one_hot(labels, f)
            return hard * (1 - smoothing) + smoothing / c if smoothing else hard

        if class_weight is None:
            return Target(smoothed, mask, float(n * t) if mask is None else mask.sum(), True)
        weight: Tensor = class_weight

        def weighted() -> Tensor:
            q = smoothed()
            w = (q @ weight).unsqueeze(-1)
            return q * weight / w.clamp_min(torch.finfo(w.dtype).tiny)

        if labels is None or mask is None:
            return Target(weighted, smoothed() @ weight, float(n * t), False)
        return Target(weighted, mask * (smoothed() @ weight), (weight[labels] * mask).sum(), False)

    def counted(self, f: Tensor, gradient: Tensor) -> Tensor | None:
        """A term counts as ignored where its gradient is exactly zero although the prediction is not saturated: a
        right prediction that is has gradient zero too, where 1 - p is below the precision of the gradient."""
        saturated = f.softmax(-1).amax(-1) > 1 - 2 * torch.finfo(gradient.dtype).eps
        return ((gradient != 0).any(-1) | saturated).to(f.dtype)

    def _p(self, f: Tensor) -> Tensor:
        """What the gradient is larger than -y by."""
        return torch.zeros_like(f) if self.of_log_probabilities else f.softmax(-1)

    def factor_in(self, f: Tensor, gradient: Tensor, counted: Tensor | None, tolerance: float) -> LabelFactor:
        return label_factor(self._p(f), gradient, counted, tolerance)

    def check_gradient(self, f: Tensor, gradient: Tensor, tolerance: float) -> str | None:
        p = self._p(f)
        kept = (gradient != 0).any(-1)
        return row_factors(p[kept], gradient[kept], tolerance) or misfit(p[kept], gradient[kept], tolerance)

    def predictive(self, f: Tensor, variance: Tensor) -> Tensor:
        return moderated(f, variance).softmax(-1)
