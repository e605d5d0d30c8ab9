"""Sides: one side of a Kronecker product, a symmetric matrix per group, in as many diagonal blocks as are kept.

    dense    [g, d, d]
    blocks   [g, k, m, m] with k m >= d: the last block is padded with zeros. m = 1 is a diagonal.

What acts on the columns of x [..., g, o, d] is `times(x, side)`; what acts on its rows is `times_left(side, x)`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchcurv.curv.linalg.symmetric import (
    Damping,
    at_least,
    eigh,
    inverse_damped,
    inverse_spd,
    known_values,
    rounding_level,
)
from torchcurv.curv.numerics import on_cpu


def block_count(d: int, factor_blocks: int, max_factor_dim: int | None) -> int:
    """Blocks of a side of size d; d of them, a diagonal, where it is larger than max_factor_dim."""
    if max_factor_dim is not None and d > max_factor_dim:
        return d
    return min(factor_blocks, d)


def side_shape(g: int, d: int, blocks: int) -> tuple[int, ...]:
    m = -(-d // blocks)
    return (g, d, d) if blocks == 1 else (g, -(-d // m), m, m)


def to_blocks(side: Tensor, blocks: int) -> Tensor:
    """The diagonal blocks of a dense side."""
    g, d = side.shape[:2]
    if blocks == 1:
        return side
    _, k, m, _ = side_shape(g, d, blocks)
    padded = F.pad(side, (0, k * m - d, 0, k * m - d)).reshape(g, k, m, k, m)
    return padded.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def folded(x: Tensor, m: int) -> Tensor:
    """[..., d] -> [..., k, m], zeros after the last column."""
    return F.pad(x, (0, -x.shape[-1] % m)).unflatten(-1, (-1, m))


def times(x: Tensor, side: Tensor) -> Tensor:
    """x @ side for x [..., g, o, d]."""
    if side.dim() == 3:
        return x @ side
    m = side.shape[-1]
    if m == 1:
        return x * side[:, None, :, 0, 0]
    product = torch.einsum("...okm,...kmp->...okp", folded(x, m), side)
    return product.flatten(-2)[..., : x.shape[-1]]


def times_left(side: Tensor, x: Tensor) -> Tensor:
    """side @ x for x [..., g, o, i]."""
    return side @ x if side.dim() == 3 else times(x.mT, side.mT).mT


def symmetrised(side: Tensor) -> Tensor:
    """A side whose lower triangle counts, with its upper one."""
    return side.tril() + side.tril(-1).mT


def norm_of_side(side: Tensor) -> Tensor:
    """The Frobenius norm of a side whose lower triangle counts."""
    return torch.hypot(2**0.5 * side.tril(-1).norm(), side.diagonal(dim1=-2, dim2=-1).norm())


def mean_diagonal(side: Tensor, d: int) -> Tensor:
    """trace / d [g]."""
    return side.diagonal(dim1=-2, dim2=-1).flatten(1).sum(-1) / d


def _padding(side: Tensor, d: int) -> Tensor:
    """The diagonal of what pads the last block [g, pad], as a view."""
    k, m = side.shape[1:3]
    return side[:, -1].diagonal(dim1=-2, dim2=-1)[:, m - (k * m - d) :]


def inverse(side: Tensor, shift: Damping, d: int) -> tuple[Tensor, Tensor]:
    """((side + shift I)^-1, ok), shift a number or a tensor [g]; the inverse of the padding is 1."""
    if side.dim() == 3:
        return inverse_spd(side, shift)
    g, k, m, _ = side.shape
    damped = side + torch.diag_embed(at_least(shift, rounding_level(side)))
    if m > 1:
        _padding(damped, d).fill_(1)
        blocks, ok = inverse_damped(damped.flatten(0, 1))
        return blocks.unflatten(0, (g, k)), ok
    fine = (damped > 0).all() & torch.isfinite(damped.sum())
    return torch.where(damped > 0, damped, torch.inf).reciprocal(), fine


def eigenbasis(side: Tensor, d: int, semidefinite: bool = True) -> tuple[Tensor, Tensor]:
    """(eigenvalues [g, d], eigenvectors in the shape of the side).

    semidefinite: whether no eigenvalue is negative but by rounding; those below the rounding level count as that then.

    The padding of the last block gets eigenvalues below all others, and its unit vectors are then moved to the end,
    so that the first d columns are the eigenvectors of what is there.
    """
    if side.dim() == 3:
        values, vectors = eigh(side)
        return known_values(values) if semidefinite else values, vectors
    g, k, m, _ = side.shape
    if m == 1:
        return side[..., 0, 0].clamp_min(0) if semidefinite else side[..., 0, 0], torch.ones_like(side)
    pad = k * m - d
    if pad:
        below = -1 - side.diagonal(dim1=-2, dim2=-1).flatten(1).sum(-1).abs()
        side = side.clone()
        _padding(side, d).copy_(below[:, None].expand(g, pad))
    values, vectors = eigh(side)
    if pad:
        values[:, -1], vectors[:, -1] = values[:, -1].roll(-pad, -1), vectors[:, -1].roll(-pad, -1)
    values = known_values(values) if semidefinite else values
    return values.flatten(1)[:, :d], vectors


def root(side: Tensor) -> Tensor:
    """L with side = L L^T; the root of its diagonal where rounding has left a matrix without one. No host sync."""
    if side.shape[-1] == 1:
        return side.sqrt()
    found, info = torch.linalg.cholesky_ex(side)
    if on_cpu(info) and not info.any():
        return found
    diagonal = torch.diag_embed(side.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt())
    return torch.where((info == 0)[..., None, None], found, diagonal)
