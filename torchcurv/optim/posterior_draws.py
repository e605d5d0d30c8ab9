"""Draws: how a backward is told from none, and what is kept between the draws of a step and of a pair."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from torchcurv.curv.approximations.factors import Factor
from torchcurv.curv.block.block import Curvature
from torchcurv.curv.graph import version_of
from torchcurv.curv.posterior.gaussian import GaussianBlock

if TYPE_CHECKING:
    from torchcurv.optim.vi import VIOptimizer


class Aside:
    """Gradients and measurements of earlier draws, while a closure that may call zero_grad() makes the next."""

    def __init__(self) -> None:
        self.grads: dict[Tensor, Tensor] = {}
        self.measured: list[tuple[Curvature, dict[str, Tensor], list[Any]]] = []
        self.curved: list[dict[Tensor, Tensor]] = []
        self.made = 0
        self.summed: list[Tensor | float] = []

    def take(self, optimizer: VIOptimizer) -> None:
        """Move what the last draw left."""
        self._take_grads(optimizer._params())
        for block in optimizer._blocks:
            self.measured.append((block, block.pending, block.pending_rows))
            block.forget_pending()
        record = optimizer._require_record()
        self.made += optimizer._made
        self.curved.append(optimizer._curved)
        self.summed += [] if record.summed is None else [record.summed]
        record.summed = None
        optimizer._forget_draws()

    def give_back(self, optimizer: VIOptimizer) -> None:
        """The sums over all draws, the last one included."""
        self.take(optimizer)
        for p, total in self.grads.items():
            p.grad = total
        for block, pending, rows in self.measured:
            if pending:
                block.add(pending)
            block.pending_rows += rows
        optimizer._made = self.made
        for curved in self.curved:
            optimizer._add_curved(curved)
        optimizer._require_record().summed = sum(self.summed) if self.summed else None

    @torch.no_grad()
    def _take_grads(self, params: Iterable[Tensor]) -> None:
        for p in params:
            if p.grad is not None:
                self.grads[p] = self.grads[p].add_(p.grad) if p in self.grads else p.grad
                p.grad = None


class Spread:
    """What the covariance of a posterior is made of, to be told from what it is made of later."""

    def __init__(self, blocks: list[GaussianBlock]) -> None:
        self.numbers = [(part.scale, part.damping, part.start) for part in blocks]
        self.tensors = [t for part in blocks for t in _tensors_of(part)]
        self.versions = [version_of(t) for t in self.tensors]

    def is_of(self, blocks: list[GaussianBlock]) -> bool:
        """Whether the posterior of these blocks has this covariance still."""
        now = Spread(blocks)
        same = len(now.tensors) == len(self.tensors) and all(map(operator.is_, now.tensors, self.tensors))
        return same and now.versions == self.versions and now.numbers == self.numbers


def _tensors_of(part: GaussianBlock) -> list[Tensor]:
    factors = (part.block.factor, part.block.draw_factor)
    return [t for factor in factors if isinstance(factor, Factor) for t in factor.state().values()]


class Kept(NamedTuple):
    """The first draw of a pair: which noise it has, θ - μ, and the covariance it is of."""

    noise: int
    deviation: dict[Tensor, Tensor]
    spread: Spread


class Shared(NamedTuple):
    """Draws that share noise: which draw it was made for, how they are made, and the covariance they are of."""

    noise: int
    make: Callable[[torch.Generator | None], dict[Tensor, Tensor]]
    spread: Spread


Marks = dict[Tensor, tuple[Any, int]]


def marks_of(params: Iterable[Tensor]) -> Marks:
    """What tells whether a gradient has changed since; does not keep it alive."""
    return {p: (weakref.ref(p.grad), version_of(p.grad)) for p in params if p.grad is not None}


def changed(params: Iterable[Tensor], marks: Marks) -> bool:
    """Whether a backward has added to a gradient."""
    for p in params:
        if p.grad is not None:
            before = marks.get(p)
            if before is None or before[0]() is not p.grad or before[1] != version_of(p.grad):
                return True
    return False


def is_wide(p: Tensor) -> bool:
    """Whether a parameter holds its own mean: it is float32 or better."""
    return p.dtype == torch.promote_types(p.dtype, torch.float32)


def mean_of(losses: list[Any]) -> Any:
    """The mean of what a closure returned under each draw."""
    if len(losses) == 1 or all(loss is None for loss in losses):
        return losses[0]
    if all(isinstance(loss, Tensor) for loss in losses):
        return torch.stack([loss.detach() for loss in losses]).mean(0)
    if all(isinstance(loss, int | float) for loss in losses):
        return sum(losses) / len(losses)
    raise TypeError(f"the closure returned a {type(losses[0]).__name__}; with num_samples > 1 it must return the loss")
