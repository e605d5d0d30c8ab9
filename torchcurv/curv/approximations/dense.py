"""Dense matrices: one per output unit, per layer, or over all layers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchcurv.curv.approximations.base import WHOLE, Approximation, Basis, Statistic, Tensors, damping_tensor
from torchcurv.curv.approximations.factor import Factor
from torchcurv.curv.approximations.factors import Eigen, KroneckerInverse
from torchcurv.curv.approximations.spectrum import map_negative_eigenvalues
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.linalg.block_diagonal import eigenbasis, inverse, side_shape, times
from torchcurv.curv.linalg.symmetric import Damping
from torchcurv.curv.numerics import sum_of
from torchcurv.curv.statistics.block import Stats


@dataclass(frozen=True)
class Dense(Approximation):
    """Whole matrices: one per layer ("block"), one over all layers ("full"), one per output unit ("unit").

    wide: the units have so many inputs that of each matrix the diagonal alone is kept.
    """

    per_unit: bool = False
    wide: bool = False
    spectrum: str | None = None

    symmetric: ClassVar = ("matrix",)

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        return {"": Statistic(("matrix",), scales_with_loss=True, needs_signals=True)}

    def describe(self, size: int, shape: tuple[int, int, int]) -> str:
        g, o, d = shape
        if not self.per_unit:
            return f"{size}²"
        return f"{g * o} x {d}" if self.wide else f"{g * o} x {d}²"

    def measure(self, stats: Stats, basis: Basis | None = None, due: Collection[str] = WHOLE) -> Tensors:
        if self.wide:
            return {"matrix": stats.squares().flatten(0, 1)[..., None, None]}
        if self.per_unit:
            return {"matrix": stats.unit_blocks().flatten(0, 1)}
        total: Tensor | None = None
        for rows in stats.row_chunks():
            total = rows.mT @ rows if total is None else total.addmm_(rows.mT, rows)
        assert total is not None
        return {"matrix": (total * stats.scale).unsqueeze(0)}

    def from_hessian_rows(self, start: int, rows: Tensor, shapes: list[tuple[int, int, int]]) -> Tensors:
        """From some of the rows [k, P] of a symmetric matrix, in the coordinates of the factor."""
        count, size = rows.shape
        if not self.per_unit:
            matrix = rows.new_zeros(1, size, size)
            matrix[0, start : start + count] = rows
            return {"matrix": matrix}
        g, o, d = shapes[0]
        places = torch.arange(start, start + count, device=rows.device)
        unit, place = places // d, places % d
        own = rows.reshape(count, g * o, d)[torch.arange(count, device=rows.device), unit]
        if self.wide:
            diagonal = rows.new_zeros(g * o, d)
            diagonal[unit, place] = own[torch.arange(count, device=rows.device), place]
            return {"matrix": diagonal[..., None, None]}
        matrix = rows.new_zeros(g * o, d, d)
        matrix[unit, place] = own
        return {"matrix": matrix}

    def product(self, tensors: Tensors, x: Tensor) -> Tensor:
        """C x for x [g, o, d]."""
        matrix = tensors["matrix"]
        return times(x.reshape(len(matrix), 1, -1), matrix).reshape(x.shape)

    def sides_of(self, tensors: Tensors) -> tuple[None, Tensor]:
        """(None, C), as a Kronecker product with one side."""
        return None, tensors["matrix"]

    def trace(self, tensors: Tensors) -> Tensor:
        return tensors["matrix"].diagonal(dim1=-2, dim2=-1).sum()

    def empty(self, layers: list[Layer], like: Tensor) -> Tensors:
        shapes = [layer.shape for layer in layers]
        g, o, d = shapes[0] if self.per_unit else (1, 1, sum(g * o * d for g, o, d in shapes))
        return {"matrix": like.new_zeros(side_shape(g * o, d, d if self.wide else 1))}

    def factor(
        self, tensors: Tensors, damping: Damping, damping_type: str, basis: Basis | None = None
    ) -> tuple[Factor, Tensor]:
        matrix = tensors["matrix"]
        d = matrix.shape[1]
        if damping_type == "factored" and self.spectrum is None:  # one factor alone takes all of the damping
            right, ok = inverse(matrix, damping, d)
            return KroneckerInverse(right, shape=(1, d)), ok
        values, vectors = eigenbasis(matrix, d, self.spectrum is None)
        values = map_negative_eigenvalues(values.unsqueeze(-2), self.spectrum)
        return Eigen(values, right=vectors, damping=damping_tensor(damping, values)), torch.isfinite(
            sum_of([values, vectors])
        )
