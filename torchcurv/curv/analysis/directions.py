"""Directions: eigenvectors of a low-rank curvature, with two derivatives of every sample's loss along them.

With ℓ_n = N times the share of sample n in L, whose mean over n is L, and its curvature C_n, whose mean is C,

    γ_nk = ∇ℓ_n · e_k        λ_nk = e_k^T C_n e_k

All of it follows from Gram matrices of rows (rows.py): neither V nor an eigenvector is formed (Dangel, Tatzel, Hennig,
"ViViT: curvature access through the generalized Gauss-Newton's low-rank structure", 2106.02624).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchcurv.curv.approximations.by_rows import ByRows, rows_in
from torchcurv.curv.approximations.rows import JacobianRows
from torchcurv.curv.block.block import Curvature
from torchcurv.curv.checks import check_number
from torchcurv.curv.kinds.base import GRADIENT_SHARES
from torchcurv.curv.linalg.symmetric import eigh

Criterion = Callable[[Tensor], Tensor]
DirectionalDamping = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Directions:
    """K eigenvectors e_k of a curvature C = V^T V with N samples, and what every sample says of them.

    evals: eigenvalues of the chosen e_k [K], in the order in which they were chosen.
    gram_evecs: ẽ_k, the unit eigenvectors of the Gram matrix V V^T [rows, K], a row per signal and sample of a pass.
    gammas: first derivatives γ [N, K]. lambdas: second derivatives λ [N, K], whose means over n are `evals`.
    spectrum: every eigenvalue of C above the cut-off, ascending.
    """

    evals: Tensor
    gram_evecs: Tensor
    gammas: Tensor
    lambdas: Tensor
    spectrum: Tensor
    rows: JacobianRows
    block: Curvature

    def vectors(self) -> list[Tensor]:
        """The unit eigenvectors, [K, *shape] for each of `block.params`, whose order need not be the model's."""
        return self.block.layout.of_parameters(self.rows.combinations(self._combinations), self.block.params)

    @property
    def _combinations(self) -> Tensor:
        """e_k = V^T ẽ_k / sqrt(λ_k)."""
        return self.gram_evecs * self.evals.rsqrt()

    def newton(self, damping: DirectionalDamping) -> list[Tensor]:
        """Σ_k -mean γ_k / (mean λ_k + δ_k) e_k with δ = damping(evals, gram_evecs, γ, λ) [K]; one [g, o, d] per
        layer."""
        delta = damping(self.evals, self.gram_evecs, self.gammas, self.lambdas)
        along = -self.gammas.mean(0) / (self.lambdas.mean(0) + delta)
        return self.rows.rows_transposed_times(self._combinations @ along)


def check_choices(cutoff: float | None, curvature_samples: int | None, gradient_samples: int | None) -> None:
    """Raise on choices that are not allowed, saying what is."""
    for name, count in (("curvature_samples", curvature_samples), ("gradient_samples", gradient_samples)):
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise ValueError(f"{name}={count!r}; pass an int of at least 1, or None for all samples")
    if cutoff is not None:
        check_number("cutoff", cutoff, lambda x: 0 <= x < 1, "a number from 0 to below 1, or None")


def with_gradient_blocks(blocks: list[Curvature]) -> list[Curvature]:
    """Blocks kept as rows, and after them for each a twin with the shares of the samples in the gradient."""
    kept = [Curvature(block.name, block.layers, block.options, approx=ByRows()) for block in blocks]
    twins = [
        Curvature(f"{block.name}:gradient", block.layers, block.options, kind=GRADIENT_SHARES, approx=ByRows())
        for block in blocks
    ]
    return [*kept, *twins]


def directions_of(
    block: Curvature,
    shares: Curvature,
    criterion: Criterion,
    cutoff: float | None = None,
    curvature_samples: int | None = None,
    gradient_samples: int | None = None,
) -> Directions:
    """The eigenvectors that a criterion chooses of a block that is kept as rows, with γ and λ.

    Args:
        shares: its twin.
        criterion: from all eigenvalues above the cut-off, ascending, to the indices [K] of those that are chosen.
        cutoff: eigenvalues up to this times the largest count as zero; None: what rounding makes of zero.
        curvature_samples, gradient_samples: only so many samples, the first of each pass, make C and λ, or γ.
    """
    measured, shared_rows = rows_in(block.tensors), rows_in(shares.tensors)
    rows = measured if curvature_samples is None else measured.first(curvature_samples)
    own = shared_rows if gradient_samples is None else shared_rows.first(gradient_samples)
    gram = rows.gram()
    if not torch.isfinite(gram.sum()):
        raise FloatingPointError(f"the curvature of block {block.name!r} is not finite")
    spectrum, vectors = eigh(gram)
    known = spectrum > spectrum.amax() * (len(gram) * torch.finfo(gram.dtype).eps if cutoff is None else cutoff)
    spectrum, vectors = spectrum[known], vectors[:, known]
    chosen = torch.as_tensor(criterion(spectrum), device=gram.device)
    evals, vectors = spectrum[chosen], vectors[:, chosen]
    sample, count = rows.samples()
    along = evals * vectors.square()  # (row · e_k)²
    lambdas = count * gram.new_zeros(count, len(evals)).index_add_(0, sample, along)
    shared = own.roots()[:, None] * (own.gram(rows) @ vectors) * evals.rsqrt()
    gammas = own.samples()[1] * shared
    return Directions(evals, vectors, gammas, lambdas, spectrum, rows, block)
