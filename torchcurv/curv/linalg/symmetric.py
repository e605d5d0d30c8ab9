"""Linear algebra of batches of symmetric matrices: eigendecompositions and damped inverses, without host syncs."""

from __future__ import annotations

import torch
from torch import Tensor

from torchcurv.curv.numerics import on_cpu

Damping = Tensor | float


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a batch; found again in float64 where float32 fails.

    It fails by an exception, or without one: MKL returns NaN for some ordinary matrices in float32. On an accelerator,
    where its result cannot be looked at without a host sync, what is not finite stays so, and the factor made of it
    counts as failed: the next is then made in float64 (`Factoring.factored_again`).
    """
    try:
        values, vectors = torch.linalg.eigh(matrix)
        total = values.sum() + vectors.sum()
        if not on_cpu(total) or matrix.dtype == torch.float64 or torch.isfinite(total):
            return values, vectors
    except torch.linalg.LinAlgError:
        pass
    if not torch.isfinite(matrix.sum()):
        return torch.full_like(matrix[..., 0], torch.nan), torch.full_like(matrix, torch.nan)
    values, vectors = torch.linalg.eigh(matrix.double())
    return values.to(matrix.dtype), vectors.to(matrix.dtype)


def eigvalsh(matrix: Tensor) -> Tensor:
    """Eigenvalues of a batch, ascending; found again in float64 where float32 fails."""
    return eigh(matrix)[0] if matrix.dtype != torch.float64 else torch.linalg.eigvalsh(matrix)


ALIGNMENT, ALIGNED_FROM = 16, 256


def aligned_empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """An empty tensor whose rows, if they are long, start at multiples of 64 bytes: products into them and with parts
    of them are 8 to 15 % faster."""
    d = shape[-1]
    if d < ALIGNED_FROM or d % ALIGNMENT == 0:
        return like.new_empty(shape)
    return like.new_empty(*shape[:-1], d + -d % ALIGNMENT)[..., :d]


BLOCK, BLOCKED_FROM = 128, 512  # side of the blocks of a large matrix on the CPU, and what is large


def _blocks(n: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]


def _workspace(n: int, like: Tensor) -> Tensor:
    """An [n, n] tensor whose rows do not start a power of two apart, where they would share the lines of a cache."""
    return like.new_empty(n, n + -n % 16 + 16)[:, :n]


def _inverse_root_(A: Tensor, W: Tensor) -> list[Tensor]:
    """W = L^-1 into zeros, for A = L L^T given by its lower triangle, which is overwritten; the error flags.

    Both are found together, [[P, 0], [-R L21 P, R]] with P, R the inverse roots of A11 and A22 - L21 L21^T and
    L21 = A21 P^T, so that nearly all work is in matrix products, which skip the known zeros.
    """
    n = A.shape[-1]
    if n <= BLOCK:
        root, info = torch.linalg.cholesky_ex(A)
        identity = torch.eye(n, dtype=A.dtype, device=A.device)
        W.copy_(torch.linalg.solve_triangular(root, identity, upper=False))
        return [info]
    h = n // 2 // 16 * 16
    first, second, off = W[:h, :h], W[h:, h:], A[h:, :h]
    flags = _inverse_root_(A[:h, :h], first)
    L21, rest = torch.empty_like(off), A[h:, h:]
    for part in _blocks(h):
        torch.mm(off[:, : part.stop], first[part, : part.stop].mT, out=L21[:, part])
    for part in _blocks(n - h):
        rest[part, : part.stop].addmm_(L21[part], L21[: part.stop].mT, alpha=-1)
    flags += _inverse_root_(rest, second)
    product = torch.empty_like(off)
    for part in _blocks(h):
        torch.mm(L21[:, part.start :], first[part.start :, part], out=product[:, part])
    product.neg_()
    for part in _blocks(n - h):
        torch.mm(second[part, : part.stop], product[: part.stop], out=W[h:, :h][part])
    return flags


def _inverse_by_blocks(A: Tensor) -> tuple[Tensor, Tensor]:
    """(A^-1 = W^T W, error flag) of one large matrix; LAPACK's own routine does not use its threads."""
    n = A.shape[-1]
    work, W = _workspace(n, A).copy_(A), _workspace(n, A).zero_()
    flags = _inverse_root_(work, W)
    out = work
    for part in _blocks(n):
        torch.mm(W[part.start :, part].mT, W[part.start :, : part.stop], out=out[part, : part.stop])
        out[: part.start, part] = out[part, : part.start].mT
    return out, torch.stack(flags).amax()


def _inverse_and_info(damped: Tensor) -> tuple[Tensor, Tensor]:
    """(inverse, info) for a batch of SPD matrices given by their lower triangles; info is 0 where Cholesky did not
    fail."""
    n, here = damped.shape[-1], on_cpu(damped)
    if here and n >= BLOCKED_FROM:
        pairs = [_inverse_by_blocks(one) for one in damped]
        inverses = [inverse for inverse, _ in pairs]
        inverse = inverses[0].unsqueeze(0) if len(inverses) == 1 else torch.stack(inverses)
        return inverse, torch.stack([info for _, info in pairs])
    root, info = torch.linalg.cholesky_ex(damped)
    identity = torch.eye(n, dtype=damped.dtype, device=damped.device)
    if not here:  # cholesky_inverse would read its error flag
        return torch.cholesky_solve(identity, root), info
    if info.any():
        root = torch.where((info == 0)[:, None, None], root, identity)  # the CPU's routine raises on a zero pivot
    return torch.cholesky_inverse(root), info


def at_least(shift: Damping, level: Tensor) -> Tensor:
    """The larger of a shift, a number or a tensor [g], and a level [g, ..., d]; the shift where that is NaN."""
    own = torch.as_tensor(shift, dtype=level.dtype, device=level.device)
    own = own.reshape(own.shape + (1,) * (level.dim() - own.dim())) if own.dim() else own
    return torch.where(level > own, level, own)


ROWS = 256  # of a large triangular matrix that are multiplied at once


def lower_times(root: Tensor, x: Tensor) -> Tensor:
    """root @ x for lower triangular root [g, n, n]; the zeros of a large one are skipped, nearly half of the work."""
    n = root.shape[-1]
    if n < BLOCKED_FROM:
        return root @ x
    parts = [root[:, at : at + ROWS, : at + ROWS] @ x[..., : at + ROWS, :] for at in range(0, n, ROWS)]
    return torch.cat(parts, -2)


def times_lower_transposed(x: Tensor, root: Tensor) -> Tensor:
    """x @ root^T for lower triangular root [g, n, n]; see `lower_times`."""
    n = root.shape[-1]
    if n < BLOCKED_FROM:
        return x @ root.mT
    parts = [x[..., : at + ROWS] @ root[:, at : at + ROWS, : at + ROWS].mT for at in range(0, n, ROWS)]
    return torch.cat(parts, -1)


SQUARED = 512  # columns of a matrix that are squared at once


def times_squares(x: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """x @ y² for x [n, k], y [k, m], squared elementwise in parts: all of it would push other things out of a cache."""
    out = x.new_empty(len(x), y.shape[1]) if out is None else out
    for at in range(0, y.shape[1], SQUARED):
        torch.mm(x, y[:, at : at + SQUARED].square(), out=out[:, at : at + SQUARED])
    return out


def rounding_level(matrix: Tensor) -> Tensor:
    """d eps A_jj [..., d]: with so much on the diagonal of a positive semidefinite A [..., d, d] in this precision its
    Cholesky factorisation succeeds, however different its rows are in size (Higham, "Accuracy and Stability of
    Numerical Algorithms" (2002), theorem 10.7)."""
    return matrix.shape[-1] * torch.finfo(matrix.dtype).eps * matrix.diagonal(dim1=-2, dim2=-1)


def known_values(values: Tensor) -> Tensor:
    """Eigenvalues [..., d] of positive semidefinite matrices, of which none is known better than to eps times the
    largest: those below count as that, and no direction is divided by a rounding."""
    return torch.maximum(values, torch.finfo(values.dtype).eps * values.amax(-1, keepdim=True).clamp_min(0))


def inverse_spd(matrix: Tensor, shift: Damping) -> tuple[Tensor, Tensor]:
    """((matrix + shift I)^-1, ok) for a batch [g, d, d]; ok is a 0-d bool tensor, no host sync.

    shift: a number or a tensor [g]; what the diagonal needs to be known in this precision, if that is more. Where
    Cholesky fails the answer is I / (trace + shift), which never overestimates the inverse, and ok is False.
    """
    damped = matrix.clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(at_least(shift, rounding_level(matrix)))
    return inverse_damped(damped)


def inverse_damped(damped: Tensor) -> tuple[Tensor, Tensor]:
    """(the inverse, ok) of a batch [g, d, d] that is positive definite; see `inverse_spd`."""
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    inverse, info = _inverse_and_info(damped)
    fine = (info == 0) & torch.isfinite(inverse.diagonal(dim1=-2, dim2=-1)).all(-1)
    if not on_cpu(fine) or not fine.all():
        identity = torch.eye(damped.shape[-1], dtype=damped.dtype, device=damped.device)
        bound = identity / diagonal.sum(-1).clamp_min(torch.finfo(damped.dtype).tiny)[:, None, None]
        inverse = torch.where(fine[:, None, None], inverse, bound)
    return inverse, fine.all()
