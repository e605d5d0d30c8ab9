"""Roots of symmetric matrices that are known by their products alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchcurv.curv.linalg.symmetric import eigh
from torchcurv.curv.numerics import on_cpu


def positive_root_times(matvec: Callable[[Tensor], Tensor], v: Tensor, steps: int) -> Tensor:
    """H₊^(1/2) v for a batch of symmetric H [n] with the positive parts H₊, and v [n, c].

    matvec: H x for x [n, c]. By Lanczos' method, f(H) v ≈ |v| Q f(T) e_1 with T = Q^T H Q (Higham, "Functions of
    Matrices" (2008), 13.2.1): exact after as many steps as H has eigenvalues, otherwise the root as the best polynomial
    of degree `steps` has it.
    """
    tiny, eps = torch.finfo(v.dtype).tiny, torch.finfo(v.dtype).eps
    size = v.norm(dim=1, keepdim=True)
    basis = [v / size.clamp_min(tiny)]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    largest = torch.zeros_like(size)
    for _ in range(min(steps, v.shape[1])):
        w = matvec(basis[-1])
        diagonal.append((w * basis[-1]).sum(1))
        Q = torch.stack(basis, 1)
        for _ in range(2):  # twice is enough for the basis to stay orthogonal to rounding
            w = w - torch.einsum("nkc,nk->nc", Q, torch.einsum("nkc,nc->nk", Q, w))
        length = w.norm(dim=1, keepdim=True)
        largest = torch.maximum(largest, torch.maximum(length, diagonal[-1].abs().unsqueeze(1)))
        goes_on = length > 32 * eps * largest  # else the space is complete, and what is left is rounding
        beside.append(torch.where(goes_on, length, 0).squeeze(1))
        if on_cpu(goes_on) and not goes_on.any():
            break
        basis.append(torch.where(goes_on, w / length.clamp_min(tiny), 0))
    k = len(diagonal)
    off = torch.diag_embed(torch.stack(beside, 1)[:, : k - 1], 1)
    T = torch.diag_embed(torch.stack(diagonal, 1)) + off + off.mT
    values, vectors = eigh(T)
    coefficients = (vectors @ (values.clamp_min(0).sqrt() * vectors[:, 0]).unsqueeze(-1)).squeeze(-1)
    return size * torch.einsum("nkc,nk->nc", torch.stack(basis[:k], 1), coefficients)
