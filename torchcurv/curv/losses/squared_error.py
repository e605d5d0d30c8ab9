"""The squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from torchcurv.curv.numerics import random_signs


class SquaredError:
    """c = 1/2 (f - y)^2 per element; torch's loss is twice that, hence R = 2 or 2 / elements."""

    elementwise = True

    @staticmethod
    def draw(f: Tensor, generator: torch.Generator | None) -> Tensor:
        return random_signs(f, generator)

    @staticmethod
    def column(f: Tensor, k: int) -> Tensor:
        column = torch.zeros_like(f)
        column[..., k] = 1
        return column

    @staticmethod
    def label(f: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.empty_like(f).normal_(generator=generator)

    @staticmethod
    def value(f: Tensor, residual: Tensor) -> Tensor:
        """c [n, t, c] from its gradient f - y."""
        return 0.5 * residual.square()

    @staticmethod
    def hessian(f: Tensor, v: Tensor) -> Tensor:
        return v

    @staticmethod
    def hessian_diagonal(f: Tensor) -> Tensor:
        return torch.ones_like(f)
