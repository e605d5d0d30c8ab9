"""Kinds of first order: C = J^T M J of the Jacobian J of the output, by signals that make up M.

ggn               M = S S^T, the Hessian of the loss at the output; or S r, r random signs
fisher            gradients at labels drawn from the model; in expectation it is the ggn where H needs no target
empirical_fisher  gradients at the true targets
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchcurv.curv.hessian.products import OutputLoss
from torchcurv.curv.kinds.base import Block, SignalKind, Signals, SignalSource
from torchcurv.curv.losses.terms import Terms


@dataclass(frozen=True)
class GGN(SignalKind):
    """The generalised Gauss-Newton matrix."""

    name: ClassVar[str] = "ggn"
    subsamples: ClassVar[bool] = True

    def signals(self, terms: Terms, generator: torch.Generator) -> Signals:
        return _columns(terms) if self.samples is None else _drawn(terms.draw, self.samples, generator)

    def output_matvec(self, loss: OutputLoss, v: Tensor) -> Tensor:
        return loss.hessian_matvec(v)


@dataclass(frozen=True)
class Fisher(SignalKind):
    """The Fisher information; exact, it is that of the GGN."""

    name: ClassVar[str] = "fisher"
    subsamples: ClassVar[bool] = True

    def signals(self, terms: Terms, generator: torch.Generator) -> Signals:
        if self.samples is not None:
            return _drawn(terms.label_gradient, self.samples, generator)
        _check_exact(terms)
        return _columns(terms)

    def output_matvec(self, loss: OutputLoss, v: Tensor) -> Tensor:
        _check_exact(loss.terms)
        return loss.hessian_matvec(v)


@dataclass(frozen=True)
class EmpiricalFisher(SignalKind):
    """sum_n u_n u_n^T, u_n the gradient of the terms of sample n at their targets."""

    name: ClassVar[str] = "empirical_fisher"
    rides: ClassVar[bool] = True
    of_samples: ClassVar[bool] = True

    def measure(self, source: SignalSource, blocks: Sequence[Block]) -> None:
        if not source.terms.formula.divisor_known:
            raise ValueError(
                "whether the loss is a sum or a mean over samples cannot be seen, which its empirical Fisher depends "
                "on: pass what the loss holds for each sample as a part of the target, or write it with "
                "torchcurv.register_loss(type, formula=)"
            )
        super().measure(source, blocks)

    def signals(self, terms: Terms, generator: torch.Generator) -> Signals:
        return Signals(1, iter([terms.gradient()]))

    def output_matvec(self, loss: OutputLoss, v: Tensor) -> Tensor:
        u = loss.term_gradients()
        return loss.restored(u * (u * loss.canonical(v)).sum((1, 2), keepdim=True))


@dataclass(frozen=True)
class GradientShares(SignalKind):
    """The share of every sample in the gradient of L / R: no curvature, but rows to read together with those of one."""

    name: ClassVar[str] = "gradient"
    of_samples: ClassVar[bool] = True

    def signals(self, terms: Terms, generator: torch.Generator) -> Signals:
        root, gradient = terms.root_weights, terms.gradient()
        return Signals(1, iter([gradient if root is None else root * gradient]))


def _columns(terms: Terms) -> Signals:
    """S e_k of every output element of a sample."""
    t, c = terms.f.shape[1:]

    def columns() -> Iterator[Tensor]:
        for position in range(t):
            for k in range(c):
                signal = torch.zeros_like(terms.f)
                signal[:, position] = terms.column(position, k)
                yield signal

    return Signals(t * c, columns())


def _drawn(draw: Callable[[torch.Generator], Tensor], samples: int, generator: torch.Generator) -> Signals:
    return Signals(samples, (draw(generator) * samples**-0.5 for _ in range(samples)))


def _check_exact(terms: Terms) -> None:
    if terms.formula.hessian_needs_target:
        raise ValueError(
            f"the exact Fisher is the GGN where the Hessian of the loss at the output is the same for every target, "
            f"and that of {terms.formula.name!r} is not: draw labels with samples=1 or more, or choose "
            'curv_type="ggn"'
        )
