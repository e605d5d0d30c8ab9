"""Approximations: which statistic of (a, s) is kept, and how it becomes a Factor.

    measure(stats, basis) -> {name: tensor}, additive over signals, micro-batches and ranks
    empty(layers, like) -> the same for no signals at all: zeros of the right shapes
    factor(tensors, damping, damping_type, basis) -> (Factor, ok)

basis is that of the block's last factor, which only ekfac asks for; ok is a 0-d bool tensor.
`linear` names the statistics that scale with the loss (the input side of K-FAC does not).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from torchcurv.curv.factor import Damping, Eigen, Factor, Inverse, eigh, inverse_spd
from torchcurv.curv.layers import Layer
from torchcurv.curv.stats import Stats

Tensors = dict[str, Tensor]
Basis = tuple[Tensor, Tensor]


class Approximation(Protocol):
    @property
    def linear(self) -> tuple[str, ...]: ...

    def measure(self, stats: Stats, basis: Basis | None = None) -> Tensors: ...

    def empty(self, layers: list[Layer], like: Tensor) -> Tensors: ...

    def factor(
        self, tensors: Tensors, damping: Damping, damping_type: str, basis: Basis | None = None
    ) -> tuple[Factor, Tensor]: ...


def _damping_tensor(damping: Damping, like: Tensor) -> Tensor:
    return torch.as_tensor(damping, dtype=like.dtype, device=like.device)


def _finite(*tensors: Tensor) -> Tensor:
    ok = torch.stack([torch.isfinite(t.sum()) for t in tensors])
    return ok.all()


# ---------------------------------------------------------------------------------------------- diagonal


@dataclass(frozen=True)
class Diagonal:
    """diag(C) = sum_{v,n} (sum_r s a)^2."""

    linear: ClassVar[tuple[str, ...]] = ("diag",)

    def measure(self, stats: Stats, basis: Basis | None = None) -> Tensors:
        return {"diag": stats.squares()}

    def empty(self, layers: list[Layer], like: Tensor) -> Tensors:
        return {"diag": like.new_zeros(layers[0].shape)}

    def factor(
        self, tensors: Tensors, damping: Damping, damping_type: str, basis: Basis | None = None
    ) -> tuple[Factor, Tensor]:
        values = tensors["diag"]
        return Eigen(values, damping=_damping_tensor(damping, values)), _finite(values)


# ------------------------------------------------------------------------------------------------- dense


@dataclass(frozen=True)
class Dense:
    """Whole matrices: one per layer ("block"), one over all layers ("full"), one per output unit ("unit")."""

    per_unit: bool = False
    linear: ClassVar[tuple[str, ...]] = ("matrix",)

    def measure(self, stats: Stats, basis: Basis | None = None) -> Tensors:
        if self.per_unit:
            return {"matrix": stats.unit_blocks().flatten(0, 1)}
        total: Tensor | None = None
        for rows in stats.row_chunks():
            total = rows.mT @ rows if total is None else total.addmm_(rows.mT, rows)
        assert total is not None
        return {"matrix": (total * stats.scale).unsqueeze(0)}

    def empty(self, layers: list[Layer], like: Tensor) -> Tensors:
        shapes = [layer.shape for layer in layers]
        g, o, d = shapes[0] if self.per_unit else (1, 1, sum(g * o * d for g, o, d in shapes))
        return {"matrix": like.new_zeros(g * o, d, d)}

    def factor(
        self, tensors: Tensors, damping: Damping, damping_type: str, basis: Basis | None = None
    ) -> tuple[Factor, Tensor]:
        matrix = tensors["matrix"]
        if damping_type == "factored":  # one factor alone takes all of the damping
            right, ok = inverse_spd(matrix, damping)
            return Inverse(right), ok
        values, vectors = eigh(matrix)
        values = values.clamp_min(0).unsqueeze(-2)
        return Eigen(values, right=vectors, damping=_damping_tensor(damping, values)), _finite(values, vectors)


# ------------------------------------------------------------------------------------------------- K-FAC


@dataclass(frozen=True)
class Kronecker:
    """C ≈ B ⊗ A per group: A = mean a a^T, B = sum s s^T (Martens & Grosse 2015; Eschenhagen et al. 2023).

    sharing: "expand" takes every position as a sample, "reduce" averages a and sums s over positions first.
    corrected: keep also the exact second moments in the eigenbasis of B ⊗ A, and use them as its eigenvalues
        (ekfac; George et al. 2018). They are measured in the basis of the last factor and carried to a new one.
    """

    sharing: str = "expand"
    corrected: bool = False

    @property
    def linear(self) -> tuple[str, ...]:
        return ("B", "moments") if self.corrected else ("B",)

    def measure(self, stats: Stats, basis: Basis | None = None) -> Tensors:
        cov, count = stats.input_cov(self.sharing)
        tensors = {"A": cov, "count": count, "B": stats.output_cov(self.sharing)}
        if self.corrected and basis is not None:
            tensors["moments"] = stats.squares(*basis)
        return tensors

    def empty(self, layers: list[Layer], like: Tensor) -> Tensors:
        g, o, d = layers[0].shape
        tensors = {"A": like.new_zeros(g, d, d), "count": like.new_zeros(()), "B": like.new_zeros(g, o, o)}
        return {**tensors, "moments": like.new_zeros(g, o, d)} if self.corrected else tensors

    def factor(
        self, tensors: Tensors, damping: Damping, damping_type: str, basis: Basis | None = None
    ) -> tuple[Factor, Tensor]:
        A, B = tensors["A"] / tensors["count"].clamp_min(torch.finfo(tensors["A"].dtype).tiny), tensors["B"]
        if damping_type == "factored" and not self.corrected:
            return self._inverses(A, B, _damping_tensor(damping, A))
        (a, right), (b, left) = eigh(A), eigh(B)
        if "moments" in tensors and basis is not None:
            values = project_moments(tensors["moments"], basis, (left, right))
        else:
            values = b.clamp_min(0).unsqueeze(-1) * a.clamp_min(0).unsqueeze(-2)
        factor = Eigen(values, left, right, _damping_tensor(damping, A))
        return factor, _finite(values, left, right)

    @staticmethod
    def _inverses(A: Tensor, B: Tensor, damping: Tensor) -> tuple[Factor, Tensor]:
        """(A + π sqrt(λ) I)^-1 and (B + sqrt(λ)/π I)^-1, π² = (tr A / dim A) / (tr B / dim B)."""
        shift_a, shift_b = split_damping(A, B, damping)
        right, ok_a = inverse_spd(A, shift_a)
        left, ok_b = inverse_spd(B, shift_b)
        return Inverse(right, left), ok_a & ok_b


def split_damping(A: Tensor, B: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Damping of A and of B, [g] each: π sqrt(λ) and sqrt(λ)/π.

    A factor of size 1 takes none, and the other then takes λ over its value; π is 1 where a trace vanishes.
    """
    mean_a = A.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean_b = B.diagonal(dim1=-2, dim2=-1).mean(-1)
    tiny = torch.finfo(A.dtype).tiny
    safe_a, safe_b = mean_a.clamp_min(tiny), mean_b.clamp_min(tiny)
    known = (mean_a > tiny) & (mean_b > tiny)
    pi = torch.where(known, safe_a / safe_b, 1).sqrt()
    shift_a, shift_b = pi * damping.sqrt(), damping.sqrt() / pi
    if B.shape[-1] == 1:
        whole = mean_b > tiny
        return torch.where(whole, damping / safe_b, shift_a), torch.where(whole, 0, shift_b)
    if A.shape[-1] == 1:
        whole = mean_a > tiny
        return torch.where(whole, 0, shift_a), torch.where(whole, damping / safe_a, shift_b)
    return shift_a, shift_b


def project_moments(moments: Tensor, old: Basis, new: Basis) -> Tensor:
    """Diagonal in the new basis of the matrix whose eigenvalues in the old basis are `moments`; keeps the trace."""
    (left, right), (new_left, new_right) = old, new
    return (new_left.mT @ left).square() @ moments @ (new_right.mT @ right).square().mT
