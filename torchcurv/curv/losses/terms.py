"""The terms of one loss call, in one layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from torchcurv.curv.numerics import on_cpu

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Terms:
    """One (output, target) pair in the layout f [n, t, c].

    reduction: R, a number or a 0-d tensor
    weights:   w [n, t] or [n, t, c]; None means all 1
    uniform:   whether every weight is 0 or one common number, so that the gradient of L is sqrt(R) times the signal
    residual:  gradient of c at the target [n, t, c]; computed when asked
    count:     what the mean over these terms divides by, whatever the reduction is
    """

    f: Tensor
    reduction: Tensor | float
    weights: Tensor | None
    uniform: bool
    residual: Callable[[], Tensor]
    count: Tensor | float = 1.0

    def __post_init__(self) -> None:
        if self.weights is not None and on_cpu(self.weights) and bool((self.weights == 1).all()):
            object.__setattr__(self, "weights", None)  # nothing to weight: knowing it saves a pass over the inputs

    @property
    def empty(self) -> bool:
        """Whether no term counts, so that L is zero (or 0/0); never known on an accelerator, where it costs a sync."""
        return self.weights is not None and on_cpu(self.weights) and not bool(self.weights.any())

    def of(self, samples: Tensor) -> Terms:
        """Those of some of the samples, with the R of all."""
        weights = None if self.weights is None else self.weights[samples]
        return replace(self, f=self.f[samples], weights=weights, residual=lambda: self.residual()[samples])

    @property
    def root_weights(self) -> Tensor | None:
        """sqrt(w), broadcastable to f."""
        if self.weights is None:
            return None
        root = self.weights.sqrt()
        return root if root.dim() == 3 else root.unsqueeze(-1)

    @property
    def position_weights(self) -> Tensor | None:
        """w [n, t] as the input covariance counts its positions."""
        if self.weights is None or self.weights.dim() == 2:
            return self.weights
        return self.weights.mean(-1)


def signal_count(terms: Terms) -> int:
    """Number of exact signals: one per output element of a sample."""
    return prod(terms.f.shape[1:])
