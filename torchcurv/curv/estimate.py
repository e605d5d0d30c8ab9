"""What is known of a symmetric matrix through products alone: eigenpairs, spectral density, trace, diagonal, norms.

C [P, P] is given by its products with blocks of columns [P, k]. Nothing larger than P times the number of products
is formed. Small matrices of inner products are kept in float64; draws come from a generator, never the global one.

Sources: Lanczos with thick restarts: Wu, Simon, "Thick-restart Lanczos method for large symmetric eigenvalue
problems" (2000). Spectral density by Lanczos quadrature: Ghorbani, Krishnan, Xiao, 1901.10159. Hutch++: Meyer,
Musco, Musco, Woodruff, 2010.09649. XDiag: Epperly, Tropp, Webber, 2301.07825.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchcurv.curv.losses import random_signs

Generator = torch.Generator | None
CONFIRMING = 20  # steps from a fresh start that must find nothing further out before eigenpairs are returned
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


class Estimate(NamedTuple):
    """An estimate and one standard deviation of its error, of the same shape."""

    value: Tensor
    standard_error: Tensor


class Eigenpairs(NamedTuple):
    """values [k], in the order asked for; vectors [P, k], orthonormal; residuals [k], norm(C x - value x).

    Within its residual of each value there is an eigenvalue of C.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


class SpectralDensity(NamedTuple):
    """Eigenvalues per unit of length, as a fraction of their number: density [G] over grid [G] integrates to 1.

    nodes, weights [probes, m]: each row is a measure of total weight 1 whose mean over the rows approximates the
    spectrum; density is that mean with every node a Gaussian of standard deviation `width`. standard_error [G]: of
    the density, over the probes.
    """

    grid: Tensor
    density: Tensor
    standard_error: Tensor
    nodes: Tensor
    weights: Tensor
    width: float


def one_of(name: str, value: Any, known: Mapping[str, Any]) -> Any:
    """What `known` has under a value, or an error that says what it could be."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; allowed are {', '.join(map(repr, known))}")
    return known[value]


def check_count(name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}; pass an int of at least {least}")
    return value


def _mean(draws: Tensor) -> Estimate:
    """The mean over the last dimension; an error of nan for a single draw."""
    count = draws.shape[-1]
    spread = draws.std(-1) if count > 1 else torch.full_like(draws[..., 0], math.nan)
    return Estimate(draws.mean(-1), spread / math.sqrt(count))


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
    outwards = one_of("which", which, ORDERS)
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


def spectral_density(
    C: Symmetric,
    probes: int = 8,
    steps: int = 64,
    width: float | None = None,
    grid: Tensor | int = 1000,
    generator: Generator = None,
) -> SpectralDensity:
    """The density of the eigenvalues by stochastic Lanczos quadrature: `probes` times `lanczos` over `steps`.

    width, grid: those of `smoothed`. Costs probes * steps products.
    """
    return smoothed(*_quadratures(C, probes, steps, generator), width, grid)


def logdet(C: Symmetric, damping: float, probes: int = 8, steps: int = 64, generator: Generator = None) -> Estimate:
    """log det(C + damping I) by stochastic Lanczos quadrature: P times the mean over probes of
    sum_j weight_j log(node_j + damping). Costs probes * steps products.

    Source: Ubaru, Chen, Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature" (2017).
    """
    nodes, weights = _quadratures(C, probes, steps, generator)
    damped = nodes + damping
    least = float(damped[weights > 0].min())
    if not least > 0:
        raise ValueError(
            f"damping={damping!r}: C + damping I has eigenvalues down to {least:.3g} or below, and its logarithm needs "
            "them positive: pass a larger damping"
        )
    return _mean(C.size * (weights * torch.where(weights > 0, damped, 1).log()).sum(-1))


def _quadratures(C: Symmetric, probes: int, steps: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """(nodes, weights) [probes, steps] of `lanczos` from as many starts."""
    pairs = [lanczos(C, steps, generator) for _ in range(check_count("probes", probes))]
    nodes, weights = (torch.stack(parts).to(C.dtype) for parts in zip(*pairs, strict=True))
    return nodes, weights


def smoothed(nodes: Tensor, weights: Tensor, width: float | None = None, grid: Tensor | int = 1000) -> SpectralDensity:
    """The mean over rows of measures [rows, m] with a Gaussian in place of each node.

    width: its standard deviation, in units of the eigenvalues; None: 1 % of the range of the nodes.
    grid: the points [G], or how many, which then cover the nodes and 8 widths on both sides.
    """
    low, high = float(nodes[weights > 0].min()), float(nodes[weights > 0].max())
    if width is None:
        width = 0.01 * (high - low) or max(abs(high), 1.0) * 0.01
    if not 0 < width < math.inf:
        raise ValueError(f"width={width!r}; pass a number > 0, in units of the eigenvalues")
    if not isinstance(grid, Tensor):
        count = check_count("grid", grid, 2)
        grid = torch.linspace(low - 8 * width, high + 8 * width, count, dtype=nodes.dtype)
    grid = grid.to(nodes)
    rows = torch.zeros(len(grid), len(nodes), dtype=nodes.dtype, device=nodes.device)
    for at, weight in zip(nodes.split(4096, 1), weights.split(4096, 1), strict=True):
        height = torch.exp(-0.5 * ((grid[:, None, None] - at) / width).square())
        rows += (height * weight).sum(-1) / (width * math.sqrt(2 * math.pi))
    density, error = _mean(rows)
    return SpectralDensity(grid, density, error, nodes, weights, width)


# --------------------------------------------------------------------------------------- random products


def hutchinson_trace(C: Symmetric, products: int = 60, generator: Generator = None) -> Estimate:
    """mean_k z_k^T C z_k over random signs z; of variance 2 (norm(C)_F² - sum_i C_ii²) / products."""
    z = C.signs(check_count("products", products), generator)
    return _mean((z * C.times(z)).sum(0))


def hutchpp_trace(C: Symmetric, products: int = 60, generator: Generator = None) -> Estimate:
    """Hutch++: tr(Q^T C Q) + mean_k z_k^T (I - Q Q^T) C (I - Q Q^T) z_k.

    Q is an orthonormal basis of C times a third of the products in random columns, a third goes into C Q, a third into
    signs z. Its error falls as 1 / products where Hutchinson's falls as the root of that; exact for rank(C) up to a
    third of the products. standard_error is that of the second term, given Q.
    """
    third = check_count("products", products, 6) // 3
    Q = torch.linalg.qr(C.times(C.normal(min(third, C.size), generator)))[0]
    z = C.signs(third, generator)
    z = z - Q @ (Q.mT @ z)
    captured = (Q * C.times(Q)).sum()
    rest = _mean((z * C.times(z)).sum(0))
    return Estimate(captured + rest.value, rest.standard_error)


TRACES = {"hutch++": hutchpp_trace, "hutchinson": hutchinson_trace}


def xdiag(C: Symmetric, products: int = 60, generator: Generator = None) -> Estimate:
    """The diagonal of C [P] by XDiag: the mean over i of

        diag(Q_i Q_i^T C) + z_i * (I - Q_i Q_i^T) C z_i,        Q_i an orthonormal basis of all C z_j but C z_i

    with random signs z_1 ... z_K, half of the products; the other half goes into C Q, Q a basis of all of them. Q_i
    lacks one direction s_i of Q, so Q_i Q_i^T = Q (I - s_i s_i^T) Q^T. Exact for rank(C) < K. standard_error [P] is
    that of the mean of the K answers, which are not quite independent.
    """
    K = min(check_count("products", products, 4) // 2, C.size)
    z = C.signs(K, generator)
    Y = C.times(z)
    Q, R = torch.linalg.qr(Y)
    U, values, Wt = torch.linalg.svd(R)
    kept = values > values.amax() * K * torch.finfo(values.dtype).eps * 8
    Q, values, W = Q @ U[:, kept], values[kept], Wt[kept].mT  # Y = Q diag(values) W^T
    CQ = C.times(Q)
    needed = 1 - W.square().sum(1) < torch.finfo(W.dtype).eps ** 0.5  # else the others span as much without it
    s = W / values * needed.unsqueeze(1)
    s = torch.nn.functional.normalize(s, dim=1, eps=torch.finfo(s.dtype).tiny).mT  # [kept, K]
    missing = Q @ s
    share = (s * (values.unsqueeze(1) * W.mT)).sum(0)  # s_i^T Q^T C z_i
    answers = (Q * CQ).sum(1, keepdim=True) - missing * (CQ @ s) + z * missing * share
    return _mean(answers)


def frobenius_norm(C: Symmetric, products: int = 60, generator: Generator = None) -> Estimate:
    """sqrt(mean_k norm(C z_k)²) over random signs z: Hutchinson's estimate of tr(C²)."""
    z = C.signs(check_count("products", products), generator)
    squared = _mean(C.times(z).square().sum(0))
    root = squared.value.sqrt()
    return Estimate(root, squared.standard_error / (2 * root.clamp_min(torch.finfo(root.dtype).tiny)))


def spectral_norm(C: Symmetric, products: int = 220, generator: Generator = None) -> Estimate:
    """The largest |eigenvalue|, by `eigh` to a residual of 1e-4 of it; standard_error is that residual, a bound."""
    found = eigh(C, 1, "magnitude", 1e-4, products, generator)
    return Estimate(found.values[0].abs(), found.residuals[0])


NORMS = {"frobenius": frobenius_norm, "spectral": spectral_norm}
