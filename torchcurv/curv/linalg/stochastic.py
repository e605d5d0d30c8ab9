"""What is known of a symmetric matrix through products alone: eigenpairs, spectral density, trace, diagonal, norms.

C [P, P] is given by its products with blocks of columns [P, k]. Nothing larger than P times the number of products
is formed. Small matrices of inner products are kept in float64; draws come from a generator, never the global one.

Sources: Lanczos with thick restarts: Wu, Simon, "Thick-restart Lanczos method for large symmetric eigenvalue
problems" (2000). Spectral density by Lanczos quadrature: Ghorbani, Krishnan, Xiao, 1901.10159. Hutch++: Meyer,
Musco, Musco, Woodruff, 2010.09649. XDiag: Epperly, Tropp, Webber, 2301.07825.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from torchcurv.curv.checks import check_count
from torchcurv.curv.linalg.krylov import Generator, Symmetric, eigh, lanczos


class Estimate(NamedTuple):
    """An estimate and one standard deviation of its error, of the same shape."""

    value: Tensor
    standard_error: Tensor


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


def _mean(draws: Tensor) -> Estimate:
    """The mean over the last dimension; an error of nan for a single draw."""
    count = draws.shape[-1]
    spread = draws.std(-1) if count > 1 else torch.full_like(draws[..., 0], math.nan)
    return Estimate(draws.mean(-1), spread / math.sqrt(count))


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
    # an SVD of K columns is right to about K roundings of the largest value; eight times that is clear of them
    kept = values > values.amax() * K * torch.finfo(values.dtype).eps * 8
    Q, values, W = Q @ U[:, kept], values[kept], Wt[kept].mT  # Y = Q diag(values) W^T
    CQ = C.times(Q)
    # 1 - norm² loses half of the digits
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
