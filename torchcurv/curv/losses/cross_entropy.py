"""Cross entropy of classes."""

from __future__ import annotations

import torch
from torch import Tensor

from torchcurv.curv.numerics import random_signs


class CrossEntropy:
    """c = -log p_y, p = softmax(f). NLLLoss on log-probabilities is the same: softmax(log p) = p, and the root's
    columns sum to zero over the classes, which log_softmax passes back unchanged."""

    elementwise = False

    @staticmethod
    def draw(f: Tensor, generator: torch.Generator | None) -> Tensor:
        """S r with S = sqrt(p_k) (e_k - p) in column k: sqrt(p) r - p (sqrt(p) . r)."""
        p = f.softmax(-1)
        u = p.sqrt() * random_signs(p, generator)
        return u - p * u.sum(-1, keepdim=True)

    @staticmethod
    def column(f: Tensor, k: int) -> Tensor:
        p = f.softmax(-1)
        column = -p * p[..., k : k + 1].sqrt()
        column[..., k] += p[..., k].sqrt()
        return column

    @staticmethod
    def label(f: Tensor, generator: torch.Generator | None) -> Tensor:
        p = f.softmax(-1)
        drawn = torch.multinomial(p.flatten(0, -2), 1, generator=generator).reshape(*p.shape[:-1], 1)
        return p.scatter_add(-1, drawn, -torch.ones_like(p[..., :1]))

    @staticmethod
    def value(f: Tensor, residual: Tensor) -> Tensor:
        """c [n, t] from its gradient p - q at the target: -sum q log p."""
        q = f.softmax(-1) - residual
        return -torch.where(q == 0, 0, q * f.log_softmax(-1)).sum(-1)

    @staticmethod
    def hessian(f: Tensor, v: Tensor) -> Tensor:
        """(diag(p) - p p^T) v."""
        p = f.softmax(-1)
        return p * v - p * (p * v).sum(-1, keepdim=True)

    @staticmethod
    def hessian_diagonal(f: Tensor) -> Tensor:
        p = f.softmax(-1)
        return p - p.square()
