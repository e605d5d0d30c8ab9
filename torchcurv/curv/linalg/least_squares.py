"""Damped linear least squares: the step of Levenberg and Marquardt from a Jacobian.

    min over d of ½ norm(J d + r)² + λ/2 Σ_i s_i d_i²,    (J^T J + λ S) d = -J^T r,    S = diag(s)

With A = J S^-1/2 and d = S^-1/2 e the damping is a multiple of the identity, and

    e = -(A^T A + λ I)^-1 A^T r = -A^T (A A^T + λ I)^-1 r

so that the smaller of the two Gram matrices is the one that is factored, once for each λ.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.numerics import full_precision, on_cpu

# Elements of the rows of a Jacobian that are made at once: on a CPU what stays in its cache beside the graph's own.
CHUNK, CHUNK_ON_CPU = 1 << 24, 1 << 18
# A multiple of rounding below which a damping is not told from what is left of zero eigenvalues in a Gram matrix.
ROUNDING = 8


def jacobian(r: Tensor, params: list[Tensor], chunk: int | None = None) -> Tensor:
    """J [m, P] of r [m] with respect to all elements of params, in order; the graph of r is kept.

    chunk: rows that are backpropagated at once, by vmap; None: as many as have 2^18 elements on a CPU, else 2^24, and
    16 at least. Where an operation cannot be batched the rows are made one by one.
    """
    m, P = len(r), sum(p.numel() for p in params)
    chunk = chunk or max(16, (CHUNK_ON_CPU if on_cpu(r) else CHUNK) // max(1, P))
    parts = []
    for start in range(0, m, chunk):
        v = torch.zeros(min(chunk, m - start), m, dtype=r.dtype, device=r.device)
        v.diagonal(start).fill_(1)
        parts.append(_products(r, params, v))
    return torch.cat(parts)


def _products(r: Tensor, params: list[Tensor], v: Tensor) -> Tensor:
    """v J [k, P] for v [k, m]."""
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    found: Sequence[Tensor | None]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        try:
            found = torch.autograd.grad(r, params, v, is_grads_batched=True, **options)
        except RuntimeError:  # of vmap; what else is wrong raises again here
            each = [torch.autograd.grad(r, params, x, **options) for x in v]
            found = [_stacked(rows) for rows in zip(*each, strict=True)]
    k, device = len(v), params[0].device
    blank = [p.new_zeros(()).expand(k, p.numel()) if g is None else g for g, p in zip(found, params, strict=True)]
    return torch.cat([g.reshape(k, -1).to(device) for g in blank], 1)


def _stacked(rows: Sequence[Tensor | None]) -> Tensor | None:
    like = next((g for g in rows if g is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if g is None else g for g in rows]).to_dense()


class DampedLeastSquares:
    """The steps d for one J [m, P] and r [m], at any damping.

    scale: s [P], all positive; None: ones. dtype: of every product and solve. form: "rows" factors A A^T [m, m],
    "parameters" A^T A [P, P], None the smaller.
    """

    def __init__(self, J: Tensor, r: Tensor, scale: Tensor | None, dtype: torch.dtype, form: str | None = None) -> None:
        # rounding of what is given bounds what can be told from zero, whatever it is computed in
        self.eps = max(torch.finfo(J.dtype).eps, torch.finfo(dtype).eps)
        self.J, self.r = J.to(dtype), r.to(dtype)
        self.root = None if scale is None else scale.to(dtype).rsqrt()
        self.by_rows = J.shape[0] < J.shape[1] if form is None else form == "rows"
        self.A = self.J if self.root is None else self.J * self.root
        with full_precision(J.device.type):
            self.gradient = self.J.mT @ self.r
        norms = torch.linalg.vector_norm(self.A, dim=0)
        self.largest_square = norms.max().square()  # the largest entry of the diagonal of A^T A
        self.rounding = ROUNDING * torch.finfo(dtype).eps * norms.square().sum()
        self._gram: Tensor | None = None
        self._svd: tuple[Tensor, Tensor, Tensor] | None = None

    def step(self, damping: float, r: Tensor | None = None) -> tuple[Tensor, int]:
        """(d [P], the number of directions it is made of) at a damping λ >= 0, also for another r [m].

        By Cholesky where λ is above what rounding leaves of zero in the Gram matrix. Below that, and for λ = 0, by
        the singular values of A in float64: those up to max(m, P) eps times the largest count as zero, so that d is
        the shortest solution; the directions are then the others.
        """
        r, e, rank = self.r if r is None else r.to(self.r), None, len(self.A) if self.by_rows else self.A.shape[1]
        with full_precision(r.device.type):
            if damping > float(self.rounding):
                e = self._by_cholesky(damping, r)
            if e is None:
                e, rank = self._by_svd(damping, r)
        return (e if self.root is None else e * self.root), rank

    def times(self, d: Tensor) -> Tensor:
        """J d [m]."""
        with full_precision(d.device.type):
            return self.J @ d

    def _by_cholesky(self, damping: float, r: Tensor) -> Tensor | None:
        if self._gram is None:
            self._gram = self.A @ self.A.mT if self.by_rows else self.A.mT @ self.A
        damped = self._gram.clone()
        damped.diagonal().add_(damping)
        root, info = torch.linalg.cholesky_ex(damped)
        if int(info):
            return None
        b = r if self.by_rows else self.A.mT @ r
        x = torch.cholesky_solve(b.unsqueeze(1), root).squeeze(1)
        return -(self.A.mT @ x if self.by_rows else x)

    def _by_svd(self, damping: float, r: Tensor) -> tuple[Tensor, int]:
        if self._svd is None:
            U, sigma, Vh = torch.linalg.svd(self.A.double(), full_matrices=False)
            self._svd = U, sigma, Vh
        U, sigma, Vh = self._svd
        kept = sigma > max(self.A.shape) * self.eps * sigma[0]
        factors = torch.where(kept, sigma / (sigma.square() + damping), 0.0)
        e = -(Vh.mT @ (factors * (U.mT @ r.double())))
        return e.to(self.A.dtype), int(kept.sum())
