"""Dense curvature of more parameters than rows: C = V^T V by the rows V of one step (rows.py)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchcurv.curv.approximations.base import WHOLE, Approximation, Averaged, Basis, Statistic, Tensors
from torchcurv.curv.approximations.factor import Factor
from torchcurv.curv.approximations.rows import JacobianRows, each_of_batch
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.linalg.symmetric import Damping
from torchcurv.curv.statistics.block import Stats

KEPT = "kept"  # the key of what is kept until the step, a tuple of Stats


@dataclass(frozen=True)
class ByRows(Approximation):
    """The whole matrix of a block through its rows: no running average, nothing to save."""

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        return {"": Statistic((KEPT,), scales_with_loss=True, needs_signals=True)}

    keeps_inputs: ClassVar[bool] = True
    gathered: ClassVar[tuple[str, ...]] = (KEPT,)

    @property
    def of_one_step(self) -> bool:
        return True

    def describe(self, size: int, shape: tuple[int, int, int]) -> str:
        return f"rows of {size}"

    def measure(self, stats: Stats, basis: Basis | None = None, due: Collection[str] = WHOLE) -> Tensors:
        return {KEPT: (stats,)}

    def edited(self, pending: Tensors) -> bool:
        return any(stats.edited for stats in pending[KEPT])

    def scaled(self, tensors: Tensors, factor: Tensor | float) -> Tensors:
        return {key: tuple(stats.scaled(factor) for stats in kept) for key, kept in tensors.items()}

    def measured_keys(self, new: Tensors) -> AbstractSet[str]:
        """None: what one step measured has no weight."""
        return set()

    def averaged(
        self, old: Tensors, new: Tensors, total: Tensor | None, shares: Mapping[str, Tensor], track_change: bool
    ) -> Averaged:
        """The new; whether it is finite shows in the factor."""
        some = next(use for uses in new[KEPT][0].uses for use in uses)
        return Averaged(new, torch.ones((), dtype=torch.bool, device=some.s.device))

    def product(self, tensors: Tensors, x: Tensor) -> Tensor:
        rows, sizes = rows_in(tensors), [layer.shape for layer in tensors[KEPT][0].layers]
        parts = x.flatten(-3).split([torch.Size(shape).numel() for shape in sizes], -1)
        by_layer = [part.unflatten(-1, shape) for part, shape in zip(parts, sizes, strict=True)]
        products = each_of_batch(rows.matvec, by_layer)
        return torch.cat([y.flatten(-3) for y in products], -1).reshape(x.shape)

    def trace(self, tensors: Tensors) -> Tensor:
        return rows_in(tensors).trace()

    def empty(self, layers: list[Layer], like: Tensor) -> Tensors:
        return {}

    def factor(
        self, tensors: Tensors, damping: Damping, damping_type: str, basis: Basis | None = None
    ) -> tuple[Factor, Tensor]:
        return rows_in(tensors).damped(damping)

    def factored_again(
        self, tensors: Tensors, damping: Damping, damping_type: str, basis: Basis | None = None
    ) -> tuple[Factor, Tensor]:
        return rows_in(tensors).damped(10 * damping, double=True)

    def follow(self, tensors: Tensors, factor: Any, damping_type: str) -> Factor:
        return rows_in(tensors)


def rows_in(tensors: Tensors) -> JacobianRows:
    """The rows of what a block holds, which answer all but `solve`, and that for a damping that is given."""
    return JacobianRows(tensors[KEPT])
