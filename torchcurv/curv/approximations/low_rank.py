"""Low rank: the largest eigenpairs of C = S^T diag(signs) S from the Gram matrix S S^T of its rows.

The rows are those of a pass, which only (a, s) are kept of (rows.py), and those of eigenpairs that are known already,
sqrt|λ| e. S itself is never formed (Dangel, Tatzel, Hennig, "ViViT: curvature access through the generalized
Gauss-Newton's low-rank structure", 2106.02624).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from torchcurv.curv.approximations.base import WHOLE, Approximation, Basis, Tensors, damping_tensor
from torchcurv.curv.approximations.factor import Factor
from torchcurv.curv.approximations.factors import LowRankEigen
from torchcurv.curv.approximations.rows import JacobianRows
from torchcurv.curv.approximations.spectrum import map_negative_eigenvalues
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.linalg.symmetric import Damping, eigh
from torchcurv.curv.statistics.block import Stats


@dataclass(frozen=True)
class LowRank(Approximation):
    """C ≈ Σ_k λ_k e_k e_k^T over the `rank` eigenpairs of largest magnitude.

    They come from Gram matrices (Dangel et al. 2022, ViViT), so they do not add up like other statistics: what was
    measured is kept as rows, and `merged` finds the pairs of a weighted sum.
    """

    rank: int
    spectrum: str | None = None
    parts: ClassVar[tuple[str, ...]] = WHOLE

    keeps_rows: ClassVar[bool] = True

    @property
    def linear(self) -> tuple[str, ...]:
        return ("values",)

    def describe(self, size: int, shape: tuple[int, int, int]) -> str:
        return f"{self.rank} of {size}"

    def follow(self, tensors: Tensors, factor: Factor, damping_type: str) -> Factor:
        return self.factor(tensors, 0.0 if factor.damping is None else factor.damping, damping_type)[0]

    def measure(self, stats: Stats, basis: Basis | None = None, due: Collection[str] = WHOLE) -> Tensors:
        raise self._refused("keeps rows, and measures nothing of them before a step")

    def merged(
        self, parts: Sequence[tuple[Tensor | float, Sequence[Stats | LowRankEigen]]]
    ) -> tuple[LowRankEigen, Tensor]:
        """(the largest pairs of Σ weight Σ C over the parts, whether all was finite)."""
        spaces: list[tuple[Tensor | float, JacobianRows | LowRankEigen]] = []
        for weight, some in parts:
            stats = tuple(part for part in some if isinstance(part, Stats))
            spaces += [(weight, JacobianRows(stats))] if stats else []
            spaces += [(weight, part) for part in some if isinstance(part, LowRankEigen)]
        return largest_pairs(spaces, self.rank)

    def product(self, tensors: Tensors, x: Tensor) -> Tensor:
        """C x for x [g, o, d]."""
        return LowRankEigen(**tensors).matvec(x)

    def trace(self, tensors: Tensors) -> Tensor:
        return tensors["values"].sum()

    def empty(self, layers: list[Layer], like: Tensor) -> Tensors:
        size = sum(torch.Size(layer.shape).numel() for layer in layers)
        return {"values": like.new_zeros(self.rank), "vectors": like.new_zeros(self.rank, size)}

    def factor(
        self, tensors: Tensors, damping: Damping, damping_type: str, basis: Basis | None = None
    ) -> tuple[Factor, Tensor]:
        values = tensors["values"]
        least = values.amin().clamp_max(0)
        rest = -least if self.spectrum == "shift" else torch.zeros_like(least)
        lam = damping_tensor(damping, values)
        return LowRankEigen(
            map_negative_eigenvalues(values[None], self.spectrum)[0], tensors["vectors"], lam, rest
        ), torch.isfinite(lam)


Part = tuple[Tensor | float, JacobianRows | LowRankEigen]  # its weight in the sum


def largest_pairs(parts: Sequence[Part], rank: int) -> tuple[LowRankEigen, Tensor]:
    """(the `rank` pairs of largest |eigenvalue| of Σ weight C, whether all was finite).

    Where there are fewer, or an eigenvalue is zero by rounding, value and vector are zero.
    """
    grams = [[_gram(first, second) for _, second in parts] for _, first in parts]
    roots = [
        torch.as_tensor(weight, dtype=row[0].dtype, device=row[0].device).sqrt()
        for (weight, _), row in zip(parts, grams, strict=True)
    ]
    gram = torch.cat(
        [
            torch.cat([x * (here * there) for x, there in zip(row, roots, strict=True)], 1)
            for row, here in zip(grams, roots, strict=True)
        ]
    )
    ok = torch.isfinite(gram.sum())
    signs = torch.cat([_signs(space, len(row[0])) for (_, space), row in zip(parts, grams, strict=True)])
    values, coefficients = _pairs(torch.where(ok, gram, 0), signs, rank)
    vectors, start = None, 0
    for (_, space), root, row in zip(parts, roots, grams, strict=True):
        own = coefficients[start : start + len(row[0])] * root
        start += len(row[0])
        some = space.combinations(own) if isinstance(space, JacobianRows) else (own.mT * _root(space)) @ space.vectors
        vectors = some if vectors is None else vectors + some
    assert vectors is not None
    return LowRankEigen(values, vectors), ok


def _pairs(gram: Tensor, signs: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(λ [rank], X [m, rank]) with the eigenpairs (λ_k, S^T X_k) of S^T diag(signs) S.

    With S S^T = Y diag(d) Y^T, the eigenvectors are S^T Y diag(d)^-1/2 z for those z of
    diag(d)^1/2 Y^T diag(signs) Y diag(d)^1/2.
    """
    d, Y = eigh(gram)
    known = d > d.amax() * len(d) * torch.finfo(d.dtype).eps
    root = torch.where(known, d, 0).sqrt()
    values, Z = eigh(root[:, None] * (Y.mT @ (signs[:, None] * Y)) * root)
    largest = values.abs().topk(min(rank, len(values))).indices
    values, Z = values[largest], Z[:, largest]
    fine = values.abs() > root.amax().square() * len(d) * torch.finfo(d.dtype).eps
    X = Y @ (torch.where(known, 1 / torch.where(known, root, 1), 0)[:, None] * Z)
    missing = rank - len(values)
    values, X = torch.where(fine, values, 0), torch.where(fine, X, 0)
    return torch.nn.functional.pad(values, (0, missing)), torch.nn.functional.pad(X, (0, missing))


def _gram(first: JacobianRows | LowRankEigen, second: JacobianRows | LowRankEigen) -> Tensor:
    """The rows of one times those of the other."""
    if isinstance(second, LowRankEigen):
        if isinstance(first, LowRankEigen):
            return (first.vectors @ second.vectors.mT) * _root(first)[:, None] * _root(second)
        return first.dots(second.vectors) * _root(second)
    if first is second:
        return second.gram()
    return _gram(second, first).mT


def _root(pairs: LowRankEigen) -> Tensor:
    return pairs.values.abs().sqrt()


def _signs(space: JacobianRows | LowRankEigen, count: int) -> Tensor:
    if isinstance(space, LowRankEigen):
        return torch.where(space.values < 0, -1, 1).to(space.values.dtype)
    like = space.stats[0].uses
    first = next(use.s for uses in like for use in uses)
    return first.new_ones(count)
