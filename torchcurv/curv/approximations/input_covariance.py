"""Input curvature: C = I ⊗ A over a layer's weight, A = mean a a^T over samples and positions; C = 0 over its bias.

It is K-FAC with the identity in the place of B: no signal is sent back, and neither the loss nor its scale enters.
A step along λ (C + λ I)^-1 g takes, for a weight gradient G [o, i] and the rows a [b, i] that came in,

    λ G (A + λ I)^-1  =  G - G a^T (b λ I + a a^T)^-1 a

and the bias gradient as it is; for λ -> ∞ it is the gradient. The second form inverts b x b in the place of
i x i; it is taken in an orthonormal basis of the rows (InputRows).

Sources: Petersen et al., "ISAAC Newton: input-based approximate curvature for Newton's method" (2023), where
A + λ I is that of one batch; Benzing, "Gradient descent on neurons and its link to approximate second-order
optimization" (2022), FOOF.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchcurv.curv.approximations.base import WHOLE, Approximation, Basis, Statistic, Tensors
from torchcurv.curv.approximations.factor import Factor
from torchcurv.curv.approximations.factors import Eigen, InputRows, KroneckerInverse
from torchcurv.curv.approximations.kronecker import Sides, side_names
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.linalg.block_diagonal import eigenbasis, inverse, norm_of_side, side_shape, symmetrised, times
from torchcurv.curv.linalg.symmetric import Damping, inverse_spd
from torchcurv.curv.numerics import sum_of
from torchcurv.curv.statistics.block import Stats

ROWS = "rows"


@dataclass(frozen=True)
class InputCurvature(Approximation):
    """C = I ⊗ A per group, with zeros for the bias.

    sides: how A is kept. sharing: "expand" takes every position as a row, "reduce" averages a over positions first.
    by_rows: where a step sees fewer rows than inputs, they are kept in the place of A. They hold what one step
        measured: there is no running average and nothing to save.
    """

    sides: Sides
    sharing: str = "expand"
    by_rows: bool = False

    symmetric: ClassVar = ("A",)

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        return {"": Statistic(("A", ROWS, "count"), scales_with_loss=False, needs_signals=False)}

    @property
    def gathered(self) -> tuple[str, ...]:
        return (ROWS,) if self.by_rows else ()

    @property
    def of_one_step(self) -> bool:
        return self.by_rows

    @property
    def forbids_memory(self) -> bool:
        return self.by_rows

    def describe(self, size: int, shape: tuple[int, int, int]) -> str:
        g, o, d = shape
        right = f"rows of {d}" if self.by_rows else side_names(self.sides, o, d)[1]
        return f"{f'{g} x ' if g > 1 else ''}(I ⊗ {right})"

    def measure(self, stats: Stats, basis: Basis | None = None, due: Collection[str] = WHOLE) -> Tensors:
        tensors: Tensors = {}
        for use in stats.only_layer("input"):
            inputs = use.inputs.without_bias()
            few = self.by_rows and use.s.shape[1:3].numel() < self.sides.sizes[1]
            key, (value, count) = (
                (ROWS, inputs.rows()) if few else ("A", inputs.cov(self.sharing, self.sides.blocks[1]))
            )
            tensors = self.collected(tensors, {key: value, "count": count})
        return tensors

    def collected(self, held: Tensors, new: Tensors) -> Tensors:
        """Rows lie one after the other, all else is summed."""
        for key, value in new.items():
            if key not in held:
                held[key] = value
            else:
                held[key] = torch.cat([held[key], value], -2) if key == ROWS else held[key] + value
        return held

    def rows_held(self, tensors: Tensors) -> int | None:
        if not self.by_rows:
            return None
        held = tensors[ROWS].shape[-2] if ROWS in tensors else 0
        return held + self.sides.sizes[1] * ("A" in tensors)  # beside A, rows are no shorter

    def condensed(self, tensors: Tensors, rows: int) -> Tensors:
        if ROWS not in tensors or rows < self.sides.sizes[1]:
            return tensors
        own = tensors[ROWS]
        rest = {key: value for key, value in tensors.items() if key != ROWS}
        return self.collected(rest, {"A": own.mT @ own})

    def norm_of(self, key: str, value: Tensor) -> Tensor:
        return norm_of_side(value) if key in self.symmetric else value.norm()

    def product(self, tensors: Tensors, x: Tensor) -> Tensor:
        """x A for x [g, o, d]."""
        total = torch.zeros_like(x)
        if "A" in tensors:
            total = total + times(x, symmetrised(tensors["A"]))
        if ROWS in tensors:
            total = total + (x @ tensors[ROWS].mT) @ tensors[ROWS]
        return total / _count(tensors)

    def sides_of(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """(I, A)."""
        rows = tensors.get(ROWS)
        A = tensors["A"] if rows is None else rows.mT @ rows + tensors.get("A", 0)
        return A.new_ones(side_shape(A.shape[0], self.sides.sizes[0], self.sides.sizes[0])), A / _count(tensors)

    def trace(self, tensors: Tensors) -> Tensor:
        own = tensors["A"].diagonal(dim1=-2, dim2=-1).sum() if "A" in tensors else 0
        rows = tensors[ROWS].square().sum() if ROWS in tensors else 0
        return (own + rows) / _count(tensors) * self.sides.sizes[0]

    def empty(self, layers: list[Layer], like: Tensor) -> Tensors:
        shape = side_shape(layers[0].shape[0], self.sides.sizes[1], self.sides.blocks[1])
        return {"A": like.new_zeros(shape), "count": like.new_zeros(())}

    def factor(
        self, tensors: Tensors, damping: Damping, damping_type: str, basis: Basis | None = None
    ) -> tuple[Factor, Tensor]:
        count, (o, d) = _count(tensors), self.sides.sizes
        lam = torch.as_tensor(damping, dtype=count.dtype, device=count.device)
        rows = tensors.get(ROWS)
        if rows is not None and "A" not in tensors and rows.shape[-2] < d:
            Q, T = torch.linalg.qr((rows / count.sqrt()).mT)
            small, ok = inverse_spd(T @ T.mT, lam)
            identity = torch.eye(T.shape[-1], dtype=T.dtype, device=T.device)
            return InputRows(Q, identity - lam * small, lam), ok
        identity, A = self.sides_of(tensors)
        if damping_type == "factored":
            right, ok = inverse(A, lam, d)
            return KroneckerInverse(right, identity, (o, d), lam), ok
        values, right = eigenbasis(A, d)
        values = values.unsqueeze(-2).repeat(1, o, 1)
        return Eigen(values, identity, right, lam), torch.isfinite(sum_of([values, right]))


def _count(tensors: Tensors) -> Tensor:
    return tensors["count"].clamp_min(torch.finfo(tensors["count"].dtype).tiny)


def input_curvature(layer: Layer, sides: Sides, sharing: str, by_rows: bool) -> InputCurvature:
    """That of a layer; by_rows: whether rows may be kept where they are few."""
    if "_t" in sides.uses:
        raise ValueError(
            f"layer {layer.name!r}: the weight of an embedding is also used transposed, by its output head, where "
            'its inputs lie on the other side, so that curv_type="input" is not known for it: choose another '
            "curv_type, or approx=None"
        )
    return InputCurvature(sides, sharing, by_rows and sides.blocks[1] == 1 and sharing == "expand")
