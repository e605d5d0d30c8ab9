"""Binary cross entropy of logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchcurv.curv.losses.distributions import label_factor, misfit, moderated
from torchcurv.curv.losses.formula import LabelFactor, Layout, LossFormula, Target


class BinaryCrossEntropy(LossFormula):
    """c = -y log s(f) - (1 - y) log(1 - s(f)) per element, s the logistic function; H = diag(s (1 - s)).

    With a pos_weight p the loss is 1 + (p - 1) y times that of the target p y / (1 + (p - 1) y).
    """

    name = "bce_with_logits"
    elementwise = True
    hessian_needs_target = False
    options = ("weight", "pos_weight")

    @staticmethod
    def _root(f: Tensor) -> Tensor:
        return (f.sigmoid() * (-f).sigmoid()).sqrt()  # 1 - s(f) = s(-f), without cancellation

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        return (1 - y) * f - F.logsigmoid(f)

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        return f.sigmoid() - y

    def root(self, f: Tensor, y: Any, v: Tensor) -> Tensor:
        return self._root(f) * v

    def column(self, f: Tensor, y: Any, k: int) -> Tensor:
        column = torch.zeros_like(f)
        column[..., k] = self._root(f[..., k])
        return column

    def hessian(self, f: Tensor, y: Any, v: Tensor) -> Tensor:
        return self._root(f).square() * v

    def label_gradient(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        p = f.sigmoid()
        sure = torch.where(torch.isfinite(p), p, 0.5)  # bernoulli raises on others; the gradient stays not finite
        return p - torch.bernoulli(sure, generator=generator)

    def read(self, f: Tensor, target: Tensor, layout: Layout, options: Mapping[str, Any]) -> Target:
        read, pos_weight = super().read(f, target, layout, options), options.get("pos_weight")
        if pos_weight is None:
            return read
        y, pos = read.y(), layout(pos_weight)
        factor = 1 + (pos - 1) * y
        weights = factor if read.weights is None else read.weights * factor
        return Target(lambda: pos * y / factor.clamp_min(torch.finfo(y.dtype).tiny), weights, read.divisor, False)

    def factor_in(self, f: Tensor, gradient: Tensor, counted: Tensor | None, tolerance: float) -> LabelFactor:
        p = torch.stack([f.sigmoid(), (-f).sigmoid()], -1)
        return label_factor(p, torch.stack([gradient, -gradient], -1), None, tolerance)

    def check_gradient(self, f: Tensor, gradient: Tensor, tolerance: float) -> str | None:
        p = f.sigmoid()
        return misfit(torch.stack([p, 1 - p], -1), torch.stack([gradient, -gradient], -1), tolerance)

    def predictive(self, f: Tensor, variance: Tensor) -> Tensor:
        return moderated(f, variance).sigmoid()
