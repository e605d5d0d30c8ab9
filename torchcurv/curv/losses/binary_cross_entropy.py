"""Binary cross entropy of logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchcurv.curv.numerics import random_signs


class BinaryCrossEntropy:
    """c = -y log s(f) - (1 - y) log(1 - s(f)) per element, s the logistic function; H = diag(s (1 - s))."""

    elementwise = True

    @staticmethod
    def _root(f: Tensor) -> Tensor:
        return (f.sigmoid() * (-f).sigmoid()).sqrt()  # 1 - s(f) = s(-f), without cancellation

    @classmethod
    def draw(cls, f: Tensor, generator: torch.Generator | None) -> Tensor:
        return cls._root(f) * random_signs(f, generator)

    @classmethod
    def column(cls, f: Tensor, k: int) -> Tensor:
        column = torch.zeros_like(f)
        column[..., k] = cls._root(f[..., k])
        return column

    @staticmethod
    def label(f: Tensor, generator: torch.Generator | None) -> Tensor:
        p = f.sigmoid()
        return p - torch.bernoulli(p, generator=generator)

    @staticmethod
    def value(f: Tensor, residual: Tensor) -> Tensor:
        """c [n, t, c] from its gradient s(f) - q at the target: -log s(f) + (1 - q) f."""
        return (1 - f.sigmoid() + residual) * f - F.logsigmoid(f)

    @classmethod
    def hessian(cls, f: Tensor, v: Tensor) -> Tensor:
        return cls._root(f).square() * v

    @classmethod
    def hessian_diagonal(cls, f: Tensor) -> Tensor:
        return cls._root(f).square()
