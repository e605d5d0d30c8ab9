"""What the data say at the parameters of a model: the sum of the loss terms, read as a negative log likelihood."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.checks import pair_of
from torchcurv.curv.losses.loss import Loss


@dataclass(frozen=True)
class Likelihood:
    """What the data say at θ*.

    energy: E, the sum of the weighted terms (of a squared error with σ² = 1). factor: of E to the user's own loss over
    all of the data, which may be reduced in any way.
    elements, log_weights: number of residuals, and sum of the logarithms of their weights, of a regression.
    """

    energy: float
    factor: float
    elements: int = 0
    log_weights: float = 0.0

    def log_prob(self, noise_variance: float | Tensor | None) -> Tensor:
        """log p(D|θ*); of a regression Σ log N(y; f, σ²/w)."""
        if noise_variance is None:
            return -torch.tensor(self.energy, dtype=torch.float64)
        noise = double(noise_variance)
        return -self.energy / noise - 0.5 * (self.elements * (2 * math.pi * noise).log() - self.log_weights)


class LikelihoodMeter:
    """The data, and the likelihood of what the model says to it while someone else goes over them."""

    def __init__(self, data: Iterable[tuple[Any, Tensor]], loss: Loss, output_fn: Callable[[Any], Tensor] | None):
        self.data, self.loss, self.output_fn = data, loss, output_fn

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        self.energy = self.factor = self.log_weights = 0.0
        self.elements = 0
        self.target: Tensor | None = None
        for x, y in map(pair_of, self.data):
            self.target = y
            yield x, y

    def note(self, output: Any) -> Any:
        """The output that the loss is applied to, having counted its terms."""
        f = output if self.output_fn is None else self.output_fn(output)
        if isinstance(f, Tensor) and self.target is not None:
            self._count(f.detach(), self.target)
            self.target = None
        return f

    @torch.no_grad()
    def _count(self, f: Tensor, target: Tensor) -> None:
        terms = self.loss.terms(f, target, self.loss.rows(f))
        values, weights = terms.value(), terms.weights
        self.energy += float((values if weights is None else values * weights).double().sum())
        inverse = float(1 / terms.reduction)
        self.factor = self.factor + inverse if self.loss.reduction == "mean" else inverse
        if self.loss.formula.gaussian:
            kept = values.new_ones(values.shape) if weights is None else weights[weights > 0]
            self.elements += kept.numel()
            self.log_weights += float(kept.double().log().sum())

    def likelihood(self) -> Likelihood:
        return Likelihood(self.energy, self.factor, self.elements, self.log_weights)


def double(value: float | Tensor) -> Tensor:
    """A 0-d tensor in float64 on the CPU."""
    return torch.as_tensor(value, dtype=torch.float64, device="cpu")
