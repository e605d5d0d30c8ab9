"""Gram matrices: sums of products over samples and positions."""

from __future__ import annotations

import torch
from torch import Tensor

from torchcurv.curv.linalg.block_diagonal import folded, side_shape
from torchcurv.curv.numerics import on_cpu

SYMMETRIC_FROM, COLUMNS = 512, 256  # a Gram matrix this large is formed by blocks of columns, 20-30 % cheaper

# ----------------------------------------------------------------------------------------------- sums


def gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x^T x for x [k, d], into `out` if given.

    A large one is formed by blocks of columns, each times the columns up to it, and the blocks above the diagonal
    stay zero: whoever factors a statistic reads its lower triangle.
    """
    d = x.shape[1]
    if d < SYMMETRIC_FROM or not on_cpu(x):
        return x.mT @ x if out is None else torch.mm(x.mT, x, out=out)
    out = x.new_zeros(d, d) if out is None else out
    for start in range(0, d, COLUMNS):
        end = min(start + COLUMNS, d)
        torch.mm(x[:, start:end].mT, x[:, :end], out=out[start:end, :end])
    return out


def position_gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """sum_{n,r} x x^T -> [g, d, d] for x [n, r, g, d], in whichever layout x is stored; into zeros `out` if given."""
    n, r, g, d = x.shape
    if g > 1:
        total = torch.einsum("nrgi,nrgj->gij", x, x)
        return total if out is None else out.copy_(total)
    out = x.new_zeros(1, d, d) if out is None else out
    x = x.squeeze(2)
    mergeable = n == 1 or x.stride(0) == r * x.stride(1)
    if not mergeable and x.stride(1) == 1 and r > d and on_cpu(x):  # channels first: one product per sample
        out[0].addbmm_(x.mT, x)
    else:
        gram(x.reshape(n * r, d), out[0])
    return out


def block_gram(x: Tensor, blocks: int) -> Tensor:
    """The diagonal blocks of sum_{n,r} x x^T for x [n, r, g, d], in the shape of a side (linalg/block_diagonal.py)."""
    g, d = x.shape[2:]
    shape = side_shape(g, d, blocks)
    if blocks == 1:
        return position_gram(x)
    if shape[-1] == 1:
        return x.square().sum((0, 1))[..., None, None]
    parts = folded(x, shape[-1])
    return torch.einsum("nrgkp,nrgkq->gkpq", parts, parts)


def product_gram(x: Tensor, y: Tensor, blocks: int) -> Tensor:
    """The diagonal blocks of sum_n M^T M for M = sum_r y x^T [g, q, d], of x [n, r, g, d] and y [n, r, g, q].

    With fewer r than q without M: sum_{n,r,t} (y_r · y_t) x_r x_t^T.
    """
    r, g, d = x.shape[1:]
    if r > y.shape[-1]:
        return block_gram(torch.einsum("nrgq,nrgd->nqgd", y, x), blocks)
    z = torch.einsum("ngrt,ntgd->nrgd", torch.einsum("nrgq,ntgq->ngrt", y, y), x)
    m = side_shape(g, d, blocks)[-1]
    if blocks == 1:
        return torch.einsum("nrgp,nrgq->gpq", x, z)
    if m == 1:
        return (x * z).sum((0, 1))[..., None, None]
    return torch.einsum("nrgkp,nrgkq->gkpq", folded(x, m), folded(z, m))
