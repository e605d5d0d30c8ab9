"""Eigenpairs of a symmetric matrix that is known by its products: Lanczos with thick restarts.

C [P, P] is given by its products with blocks of columns [P, k]. Small matrices of inner products are kept in float64;
draws come from a generator, never the global one. Source: Wu, Simon, "Thick-restart Lanczos method for large
symmetric eigenvalue problems" (2000).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchcurv.curv.checks import check_count, entry_of
from torchcurv.curv.numerics import random_signs

Generator = torch.Generator | None
# Steps from a fresh start that must find nothing further out before eigenpairs are returned: as many as Lanczos takes
# to show an extreme eigenvalue of a random start to about a hundredth of the range.
CONFIRMING = 20
ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "largest": lambda values: values,
    "smallest": lambda values: -values,
    "magnitude": lambda values: values.abs(),
}


@dataclass(frozen=True)
class Symmetric:
    """C through `matvec`, which takes [P, k] to C times it; size: P."""

    matvec: Callable[[Tensor], Tensor]
    size: int
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"

    def times(self, x: Tensor) -> Tensor:
        """C x for columns [P, k], which may be none."""
        return self.matvec(x).to(self.dtype) if x.shape[1] else x

    def normal(self, k: int, generator: Generator) -> Tensor:
        """Standard normal columns [P, k], drawn on the device of the generator."""
        device = self.device if generator is None else generator.device
        return torch.randn(self.size, k, dtype=self.dtype, device=device, generator=generator).to(self.device)

    def signs(self, k: int, generator: Generator) -> Tensor:
        """Columns [P, k] of +1 and -1."""
        device = self.device if generator is None else generator.device
        like = torch.empty(self.size, k, dtype=self.dtype, device=device)
        return random_signs(like, generator).to(self.device)


class Eigenpairs(NamedTuple):
    """values [k], in the order asked for; vectors [P, k], orthonormal; residuals [k], norm(C x - value x).

    Within its residual of each value there is an eigenvalue of C.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


# ------------------------------------------------------------------------------------------------ Lanczos


class Krylov:
    """An orthonormal basis V [P, m] that grows by products with C, and T = V^T C V [m, m] in float64.

    C V = V T + (r, in the column of the last product): `left` is the norm of r, and `next` its direction or, where r
    vanished or `start` asks for it, a random one. Each new column is orthogonalised twice against all others.
    """

    def __init__(self, C: Symmetric, columns: int, generator: Generator) -> None:
        self.C, self.generator = C, generator
        self.store = torch.zeros(C.size, min(columns, C.size), dtype=C.dtype, device=C.device)
        self.T = torch.zeros(0, 0, dtype=torch.float64)
        self.left = 0.0
        self.start()

    @property
    def m(self) -> int:
        return len(self.T)

    @property
    def V(self) -> Tensor:
        return self.store[:, : self.m]

    @property
    def full(self) -> bool:
        return self.m == self.store.shape[1]

    @property
    def complete(self) -> bool:
        """Whether V spans the whole space."""
        return self.m == self.C.size

    def start(self) -> None:
        """Go on from a random direction."""
        self.next = self._unit(self._orthogonal(self.C.normal(1, self.generator)[:, 0])[0])

    def _unit(self, r: Tensor) -> Tensor:
        """r over its norm; little of what r was before may be left, and rounding in it."""
        r = self._orthogonal(r / r.norm())[0]
        return r / r.norm()

    def _orthogonal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x minus its part in V, V^T x)."""
        first = self.V.mT @ x
        x = x - self.V @ first
        second = self.V.mT @ x
        return x - self.V @ second, first + second

    def grow(self) -> None:
        """One product: V and T by one column."""
        m = self.m
        self.store[:, m] = self.next
        product = self.C.times(self.next.unsqueeze(1))[:, 0]
        self.T = torch.nn.functional.pad(self.T, (0, 1, 0, 1))
        r, column = self._orthogonal(product)
        self.T[:, m] = self.T[m, :] = column.to(self.T)
        self.left = float(r.norm())
        if not math.isfinite(self.left):
            raise ValueError("a product with the curvature is not finite: look at the loss and the parameters")
        # what two orthogonalisations leave of a vector that lies in the space: a few roundings of C
        if self.left > 16 * torch.finfo(self.C.dtype).eps * float(self.T.abs().max()):
            self.next = self._unit(r)
            return
        self.left = 0.0
        if not self.complete:
            self.start()

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """(values [m] ascending, coordinates [m, m] in V, residuals [m])."""
        values, S = torch.linalg.eigh(self.T)
        return values, S, self.left * S[-1].abs()

    def compress(self, values: Tensor, S: Tensor) -> None:
        """Keep the Ritz vectors with these values and coordinates [m, kept]; `left` is lost to the next product."""
        kept = self.V @ S.to(self.V)
        self.store[:, : kept.shape[1]] = kept
        self.T = values.diag()


def eigh(
    C: Symmetric,
    k: int,
    which: str = "largest",
    tol: float = 1e-3,
    max_products: int | None = None,
    generator: Generator = None,
) -> Eigenpairs:
    """The k eigenpairs furthest out, by Lanczos with thick restarts.

    An eigenvalue that is there several times has as many pairs, which one start does not see: when k pairs have
    converged, a fresh random start orthogonal to them must find no other that belongs among them.

    Args:
        which: "largest", "smallest" (algebraic) or "magnitude".
        tol: a pair has converged when its residual is below tol times the largest magnitude seen.
        max_products: after these the pairs are returned as they are, with a warning; None: 20 k + 200.

    The residuals returned are measured, by k more products. Memory: 3 k + 40 columns of size P.
    """
    outwards = entry_of("which", which, ORDERS)
    if check_count("k", k) > C.size:
        raise ValueError(f"k={k} eigenpairs of a matrix of size {C.size}; ask for at most {C.size}")
    if not tol >= 0:
        raise ValueError(f"tol={tol!r}; pass a number >= 0")
    budget = 20 * k + 200 if max_products is None else check_count("max_products", max_products, k)
    space = Krylov(C, 2 * k + 40, generator)
    since, confirming, largest = 0, False, 0.0
    for _ in range(budget):
        space.grow()
        since += 1
        values, S, residuals = space.ritz()
        order = outwards(values).sort(descending=True).indices
        largest = max(largest, float(values.abs().max()))
        enough = tol * largest
        converged = space.m >= k and bool((residuals[order[:k]] <= enough).all())
        beyond = len(order) > k and since >= CONFIRMING and float(residuals[order[k]]) <= enough
        if space.complete or (converged and confirming and beyond):  # the fresh start has found the next pair
            return _pairs(space, S[:, order[:k]])
        if converged and not confirming:
            space.compress(values[order[:k]], S[:, order[:k]])
            space.start()
            since, confirming = 0, True
        elif space.full and not space.complete:
            kept = order[: k + (space.m - k) // 2]
            space.compress(values[kept], S[:, kept])
        confirming &= converged
    warnings.warn(
        f"max_products={budget} were too few to find k={k} eigenpairs to tol={tol:g} and to confirm them: look at "
        "their residuals, and raise max_products= or tol=",
        RuntimeWarning,
        stacklevel=3,
    )
    values, S, _ = space.ritz()
    order = outwards(values).sort(descending=True).indices
    return _pairs(space, S[:, order[:k]])


def _pairs(space: Krylov, S: Tensor) -> Eigenpairs:
    """The Ritz vectors with coordinates S [m, k], their Rayleigh quotients and true residuals: k products."""
    vectors = space.V @ S.to(space.V)
    product = space.C.times(vectors)
    values = (vectors * product).sum(0)
    return Eigenpairs(values, vectors, (product - vectors * values).norm(dim=0))


def lanczos(C: Symmetric, steps: int, generator: Generator = None) -> tuple[Tensor, Tensor]:
    """(nodes, weights) [steps] of the Gauss quadrature of x^T f(C) x for a random unit vector x.

    Nodes are the eigenvalues of V^T C V over the Krylov space of x, weights the squared first entries of its
    eigenvectors; exact for polynomials f of degree 2 steps - 1. Where the space ends earlier, weights are zero.
    Memory: `steps` columns of size P.
    """
    space = Krylov(C, check_count("steps", steps), generator)
    while not space.full:
        space.grow()
        if not space.left:
            break
    values, S = torch.linalg.eigh(space.T)
    fill = (0, steps - len(values))
    return torch.nn.functional.pad(values, fill), torch.nn.functional.pad(S[0].square(), fill)
