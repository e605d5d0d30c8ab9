"""The terms of one loss call, in one layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchcurv.curv.losses.formula import LossFormula
from torchcurv.curv.numerics import on_cpu

REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Terms:
    """One (output, target) pair in the layout f [n, t, c], and the derivatives of its c(f, y) with respect to f.

    reduction: R, a number or a 0-d tensor
    weights:   w [n, t] or [n, t, c]; None means all 1
    uniform:   whether every weight is 0 or one common number, so that the gradient of L is sqrt(R) times the signal
    target:    y [n, t, c], computed when asked; None where the loss is known by its name alone
    arrived:   where the target is not known, dc/df as the gradient that arrived says it
    count:     what the mean over these terms divides by, whatever the reduction is
    """

    formula: LossFormula
    f: Tensor
    reduction: Tensor | float
    weights: Tensor | None
    uniform: bool
    target: Callable[[], Tensor] | None
    arrived: Callable[[], Tensor] | None = None
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
        target, arrived = _chosen(self.target, samples), _chosen(self.arrived, samples)
        return replace(self, f=self.f[samples], weights=weights, target=target, arrived=arrived)

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

    # -------------------------------------------------------------------- derivatives of c, unweighted

    def _y(self) -> Tensor | None:
        """The target, where the Hessian depends on it."""
        return self.target() if self.formula.hessian_needs_target and self.target is not None else None

    def value(self) -> Tensor:
        """c [n, t], or [n, t, c] of an elementwise loss."""
        assert self.target is not None
        return self.formula.value(self.f, self.target())

    def gradient(self) -> Tensor:
        """dc/df [n, t, c]."""
        if self.arrived is not None:
            return self.arrived()
        assert self.target is not None
        return self.formula.gradient(self.f, self.target())

    def arriving_gradient(self) -> Tensor:
        """What backward brings to f of c [n, t, c], where the target is known."""
        assert self.target is not None
        return self.formula.arriving_gradient(self.f, self.target())

    def draw(self, generator: torch.Generator | None) -> Tensor:
        """S r [n, t, c] for random signs r."""
        return self.formula.draw(self.f, self._y(), generator)

    def label_gradient(self, generator: torch.Generator | None) -> Tensor:
        """dc/df [n, t, c] at labels of the model's own."""
        return self.formula.label_gradient(self.f, generator)

    def column(self, position: int, k: int) -> Tensor:
        """S e_k of one of the t terms of every sample [n, c]."""
        y = self._y()
        return self.formula.column(self.f[:, position], None if y is None else y[:, position], k)

    def hessian(self, v: Tensor) -> Tensor:
        """H v for v like f."""
        return self.formula.hessian(self.f, self._y(), v)

    def hessian_diagonal(self) -> Tensor:
        """That of H [n, t, c]."""
        return self.formula.hessian_diagonal(self.f, self._y())


def _chosen(values: Callable[[], Tensor] | None, samples: Tensor) -> Callable[[], Tensor] | None:
    return None if values is None else lambda: values()[samples]
