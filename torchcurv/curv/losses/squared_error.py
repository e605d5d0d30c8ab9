"""The squared error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.losses.formula import Layout, LossFormula, Target


class SquaredError(LossFormula):
    """c = 1/2 (f - y)^2 per element; torch's loss is twice that, hence R = 2 or 2 / elements."""

    name = "mse"
    elementwise = True
    factor = 2.0
    gaussian = True
    hessian_needs_target = False
    options = ("weight",)

    def value(self, f: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (f - y).square()

    def gradient(self, f: Tensor, y: Tensor) -> Tensor:
        return f - y

    def root(self, f: Tensor, y: Any, v: Tensor) -> Tensor:
        return v

    def hessian_diagonal(self, f: Tensor, y: Any) -> Tensor:
        return torch.ones_like(f)

    def label_gradient(self, f: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.empty_like(f).normal_(generator=generator)

    def read(self, f: Tensor, target: Tensor, layout: Layout, options: Mapping[str, Any]) -> Target:
        """torch's weighted mean divides by the sum of the weights."""
        read = super().read(f, target, layout, options)
        return read if read.weights is None else read._replace(divisor=read.weights.sum())

    def predictive(self, f: Tensor, variance: Tensor) -> Tensor:
        raise ValueError("predict_probit is of classifications, not squared errors: use predict_regression")
