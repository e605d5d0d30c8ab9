"""Low rank: the largest eigenpairs of C = S^T diag(signs) S from the Gram matrix S S^T of its rows.

The rows are those of a pass, which only (a, s) are kept of (rows.py), and those of eigenpairs that are known already,
sqrt|λ| e. S itself is never formed (Dangel, Tatzel, Hennig, "ViViT: curvature access through the generalized
Gauss-Newton's low-rank structure", 2106.02624).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchcurv.curv.approximations.base import (
    WHOLE,
    Approximation,
    Averaged,
    Basis,
    Statistic,
    Tensors,
    damping_tensor,
)
from torchcurv.curv.approximations.by_rows import KEPT
from torchcurv.curv.approximations.factor import Factor
from torchcurv.curv.approximations.factors import LowRankEigen
from torchcurv.curv.approximations.rows import JacobianRows, row_count
from torchcurv.curv.approximations.spectrum import map_negative_eigenvalues
from torchcurv.curv.hessian.products import CurvatureVectorProduct
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.linalg import krylov
from torchcurv.curv.linalg.symmetric import Damping, eigh
from torchcurv.curv.numerics import chosen, sum_of
from torchcurv.curv.statistics.block import Stats


@dataclass(frozen=True)
class LowRank(Approximation):
    """C ≈ Σ_k λ_k e_k e_k^T over the `rank` eigenpairs of largest magnitude.

    They come from Gram matrices (Dangel et al. 2022, ViViT), so they do not add up like other statistics: what was
    measured is kept as rows until the step, or of more rows than `rows_limit` the largest pairs, and `merged` finds
    the pairs of a weighted sum.
    """

    rank: int
    spectrum: str | None = None
    rows_limit: int = 2048

    gathered: ClassVar[tuple[str, ...]] = (KEPT,)

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        return {"": Statistic(("values", "vectors", KEPT), scales_with_loss=True, needs_signals=True)}

    def describe(self, size: int, shape: tuple[int, int, int]) -> str:
        return f"{self.rank} of {size}"

    def follow(self, tensors: Tensors, factor: Any, damping_type: str) -> Factor:
        return self.factor(tensors, 0.0 if factor.damping is None else factor.damping, damping_type)[0]

    def measure(self, stats: Stats, basis: Basis | None = None, due: Collection[str] = WHOLE) -> Tensors:
        return {KEPT: tuple(stats.parts(self.rows_limit))}

    def edited(self, pending: Tensors) -> bool:
        return any(part.edited for part in pending[KEPT])

    def collected(self, held: Tensors, new: Tensors) -> Tensors:
        """Rows until the step; of too many for their Gram matrix, the largest eigenpairs."""
        kept = held.get(KEPT, ())
        for part in new[KEPT]:
            kept = (*kept, part)
            if row_count(kept) > self.rows_limit:
                pairs, ok = self.merged([(1.0, kept)])
                kept = (replace(pairs, values=torch.where(ok, pairs.values, torch.nan)),)
        return {KEPT: kept}

    def scaled(self, tensors: Tensors, factor: Tensor | float) -> Tensors:
        """That of rows, and of eigenpairs."""
        found = {**tensors}
        if KEPT in tensors:
            found[KEPT] = tuple(part.scaled(factor) for part in tensors[KEPT])
        if "values" in tensors:
            found["values"] = tensors["values"] * factor
        return found

    def measured_keys(self, new: Tensors) -> AbstractSet[str]:
        return {"values", "vectors"}

    def averaged(
        self, old: Tensors, new: Tensors, total: Tensor | None, shares: Mapping[str, Tensor], track_change: bool
    ) -> Averaged:
        """The largest pairs of the weighted sum."""
        share = shares["values"]
        before = [(1 - share, [LowRankEigen(**old)])] if old else []
        merged, ok = self.merged([(share, new[KEPT]), *before])
        state = merged.state()
        held = old or {key: torch.zeros_like(value) for key, value in state.items()}
        moved = {}
        if track_change:
            change = merged.distance(LowRankEigen(**held))
            moved["values"] = torch.where(held["values"].any(), change, torch.inf)
        return Averaged({key: chosen(ok, state[key], value) for key, value in held.items()}, ok, moved)

    def from_hessian(
        self, products: CurvatureVectorProduct, layout: Any, generator: torch.Generator | None
    ) -> Iterator[Tensors]:
        """The eigenpairs of largest magnitude of the Hessian of one loss, by Lanczos."""
        first = products.first[0]
        like = torch.zeros((), dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)
        if not torch.isfinite(sum_of(list(products.first))):
            unknown = LowRankEigen(like.new_full((self.rank,), torch.nan), like.new_zeros(self.rank, layout.size))
            yield {KEPT: (unknown,)}
            return

        def times(x: Tensor) -> Tensor:
            return layout.coordinates(products(layout.of_parameters(x.mT, products.params))).mT

        matrix = krylov.Symmetric(times, layout.size, like.dtype, like.device)
        found = krylov.eigh(matrix, self.rank, "magnitude", generator=generator)
        yield {KEPT: (LowRankEigen(found.values, found.vectors.mT),)}

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
    d, Y = eigh(gram)  # backward stable: eigenvalues are right to len(d) roundings of the largest
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
