"""What is remembered of draws: which covariance they are of, and whether a backward has added to gradients."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchcurv.curv.graph import version_of
from torchcurv.curv.posterior.gaussian import GaussianBlock


class CovarianceVersion:
    """What the covariance of a posterior is made of, to be told from what it is made of later."""

    def __init__(self, blocks: list[GaussianBlock]) -> None:
        self.numbers = [(part.scale, part.damping, part.start) for part in blocks]
        self.tensors = [t for part in blocks for t in _tensors_of(part)]
        self.versions = [version_of(t) for t in self.tensors]

    def is_of(self, blocks: list[GaussianBlock]) -> bool:
        """Whether the posterior of these blocks has this covariance still."""
        now = CovarianceVersion(blocks)
        same = len(now.tensors) == len(self.tensors) and all(map(operator.is_, now.tensors, self.tensors))
        return same and now.versions == self.versions and now.numbers == self.numbers


def _tensors_of(part: GaussianBlock) -> list[Tensor]:
    factors = [slot.factor for slot in part.block.factors.values()]
    return [t for factor in factors if factor is not None for t in factor.state().values()]


class AntitheticDraw(NamedTuple):
    """The first draw of a pair: which noise it has, θ - μ, and the covariance it is of."""

    noise: int
    deviation: dict[Tensor, Tensor]
    version: CovarianceVersion


class SharedNoise(NamedTuple):
    """Draws that share noise: which draw it was made for, how they are made, and the covariance they are of."""

    noise: int
    make: Callable[[torch.Generator | None], dict[Tensor, Tensor]]
    version: CovarianceVersion


GradientVersions = dict[Tensor, tuple[Any, int]]


def gradient_versions(params: Iterable[Tensor]) -> GradientVersions:
    """What tells whether a gradient has changed since; does not keep it alive."""
    return {p: (weakref.ref(p.grad), version_of(p.grad)) for p in params if p.grad is not None}


def gradients_changed(params: Iterable[Tensor], before: GradientVersions) -> bool:
    """Whether a backward has added to a gradient."""
    for p in params:
        if p.grad is not None:
            known = before.get(p)
            if known is None or known[0]() is not p.grad or known[1] != version_of(p.grad):
                return True
    return False


def holds_its_mean(p: Tensor) -> bool:
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
