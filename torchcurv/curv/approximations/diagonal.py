"""The diagonal of the curvature."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchcurv.curv.approximations.base import WHOLE, Approximation, Basis, Statistic, Tensors, damping_tensor
from torchcurv.curv.approximations.factor import Factor, with_tensors
from torchcurv.curv.approximations.factors import Eigen
from torchcurv.curv.approximations.spectrum import map_negative_eigenvalues
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.linalg.symmetric import Damping
from torchcurv.curv.statistics.block import Stats
from torchcurv.curv.statistics.layer import LayerData


@dataclass(frozen=True)
class Diagonal(Approximation):
    """diag(C) = sum_{v,n} (sum_r s a)^2."""

    spectrum: str | None = None

    propagated: ClassVar[str | None] = "diag"

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        return {"": Statistic(("diag",), scales_with_loss=True, needs_signals=True)}

    def of_diagonal(self, use: LayerData) -> Tensors:
        return {"diag": use.weighted_squares()}

    def follow(self, tensors: Tensors, factor: Factor, damping_type: str) -> Factor:
        values = tensors["diag"]
        as_they_are = self.spectrum in (None, "abs")  # magnitudes are taken when they are read
        return with_tensors(
            factor, {"values": values if as_they_are else map_negative_eigenvalues(values, self.spectrum)}
        )

    def of_diagonal_estimate(self, diagonal: Tensor) -> Tensors:
        return {"diag": diagonal}

    def measure(self, stats: Stats, basis: Basis | None = None, due: Collection[str] = WHOLE) -> Tensors:
        return {"diag": stats.squares()}

    def from_hessian_rows(self, start: int, rows: Tensor, shapes: list[tuple[int, int, int]]) -> Tensors:
        """From some of the rows [k, P] of a symmetric matrix, in the coordinates of the factor."""
        diagonal = rows.new_zeros(rows.shape[1])
        diagonal[start : start + len(rows)] = rows.diagonal(start)
        return {"diag": diagonal.reshape(shapes[0])}

    def product(self, tensors: Tensors, x: Tensor) -> Tensor:
        """C x for x [g, o, d]."""
        return tensors["diag"] * x

    def trace(self, tensors: Tensors) -> Tensor:
        return tensors["diag"].sum()

    def empty(self, layers: list[Layer], like: Tensor) -> Tensors:
        return {"diag": like.new_zeros(layers[0].shape)}

    def factor(
        self, tensors: Tensors, damping: Damping, damping_type: str, basis: Basis | None = None
    ) -> tuple[Factor, Tensor]:
        values = tensors["diag"]
        lam = damping_tensor(damping, values)
        fine = torch.isfinite(lam)  # the average lets in only what is finite
        if self.spectrum in (None, "abs"):
            return Eigen(values, damping=lam, absolute=self.spectrum == "abs"), fine
        return Eigen(map_negative_eigenvalues(values, self.spectrum), damping=lam), fine
