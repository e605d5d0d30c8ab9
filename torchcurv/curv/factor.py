"""Factors: a symmetric matrix C in a form that can be multiplied, inverted, sampled and measured.

Every shape of curvature is a grouped Kronecker product in disguise. The parameters of a block are viewed as
x [..., g, o, i] and C = sum over nothing but the pair (left [g, o, o], right [g, i, i]):

    kfac    g = groups, o = outputs, i = inputs
    unit    g = groups * outputs, o = 1, i = inputs         (left = 1)
    block   g = 1, o = 1, i = all parameters                (left = 1)
    diag    neither left nor right: C is diagonal           (left = right = 1)

Two families. `Eigen` holds C = Q diag(values) Q^T and knows everything for any damping. `Inverse` holds the
explicit inverses of two damped factors: the fast path, since products with them are plain matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

Damping = Tensor | float


def _sandwich(left: Tensor | None, x: Tensor, right: Tensor | None) -> Tensor:
    """left x right over [..., g, o, i], a missing side being the identity."""
    if left is not None:
        x = left @ x
    return x if right is None else x @ right


class _Saved:
    """Factors are frozen records of tensors: what goes into a state_dict and comes back."""

    def state(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {key: value for key, value in values.items() if value is not None}


@dataclass(frozen=True)
class Eigen(_Saved):
    """C = Q diag(values) Q^T with Q = left ⊗ right; `damping` is a 0-d tensor added to the values by default."""

    values: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    damping: Tensor | None = None

    @property
    def diagonal(self) -> bool:
        """Whether C is diagonal as it stands: then values may have any shape, such as a parameter's own."""
        return self.left is None and self.right is None

    def _apply(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        if self.diagonal:
            return f(x)
        shape = x.shape
        x = x.reshape(*shape[:-3], *self.values.shape)
        x = _sandwich(_t(self.left), x, self.right)
        return _sandwich(self.left, f(x), _t(self.right)).reshape(shape)

    def _damped(self, damping: Damping | None) -> Tensor:
        chosen = self.damping if damping is None else damping
        return self.values if chosen is None else self.values + chosen

    def matvec(self, x: Tensor) -> Tensor:
        """C x for x [..., g, o, i]."""
        return self._apply(x, lambda y: y * self.values)

    def solve(self, x: Tensor, damping: Damping | None = None) -> Tensor:
        """(C + damping I)^-1 x."""
        damped = self._damped(damping)
        if self.diagonal and damped is not self.values and x.shape == damped.shape:
            return torch.div(x, damped, out=damped)  # into the sum just formed
        return self._apply(x, lambda y: y / damped)

    def sample(self, noise: Tensor, damping: Damping | None = None) -> Tensor:
        """Q (values + damping)^-1/2 noise, of covariance (C + damping I)^-1 for standard normal noise."""
        shape = noise.shape
        x = noise.reshape(*shape[:-3], *self.values.shape) * self._damped(damping).rsqrt()
        return _sandwich(self.left, x, _t(self.right)).reshape(shape)

    def logdet(self, damping: Damping | None = None) -> Tensor:
        return self._damped(damping).log().sum()

    def diag(self) -> Tensor:
        """Diagonal of C [g, o, i]."""
        return _sandwich(_square(self.left), self.values, _t(_square(self.right)))

    def trace(self) -> Tensor:
        return self.values.sum()

    def eigvalsh(self) -> Tensor:
        return self.values.flatten().sort().values


@dataclass(frozen=True)
class Inverse(_Saved):
    """(damped C)^-1 = left ⊗ right, both explicit; the damping is inside.

    Sampling and the determinant take a Cholesky factor of the inverse when asked.
    """

    right: Tensor
    left: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "right", _aligned(self.right))

    def solve(self, x: Tensor, damping: None = None) -> Tensor:
        shape = x.shape
        sides = self.right.shape
        rows = 1 if self.left is None else self.left.shape[-1]
        x = x.reshape(*shape[:-3], sides[0], rows, sides[-1])
        return _sandwich(self.left, x, self.right).reshape(shape)

    def solve_columns(self, columns: list[Tensor]) -> list[Tensor]:
        """`solve` for an x [..., g, o, i] given by its blocks of columns, where there is a left side.

        Weight and bias are neither joined nor cut apart, and the sizes of the products stay those of the weight.
        """
        sizes = [x.shape[-1] for x in columns]
        solved = []
        for right in self.right.split(sizes, -1):
            pairs = zip(columns, right.split(sizes, -2), strict=True)
            (x, block), *wider = sorted(pairs, key=lambda pair: pair[0].shape[-1])  # a sum grows best in a product
            y = x @ block
            for x, block in wider:
                y = y.baddbmm_(x, block) if y.dim() == 3 else y + x @ block
            solved.append(_sandwich(self.left, y, None))
        return solved

    def sample(self, noise: Tensor, damping: None = None) -> Tensor:
        """K_left noise K_right^T with left = K_left K_left^T, right = K_right K_right^T."""
        roots = [None if m is None else torch.linalg.cholesky(m) for m in (self.left, self.right)]
        rows = 1 if self.left is None else self.left.shape[-1]
        x = noise.reshape(*noise.shape[:-3], self.right.shape[0], rows, self.right.shape[-1])
        return _sandwich(roots[0], x, _t(roots[1])).reshape(noise.shape)

    def logdet(self, damping: None = None) -> Tensor:
        """log det of the damped C, that is minus that of the inverse."""
        right = _logdet_spd(self.right)
        if self.left is None:
            return -right.sum()
        return -(right * self.left.shape[-1] + _logdet_spd(self.left) * self.right.shape[-1]).sum()


Factor = Eigen | Inverse


ALIGNMENT, ALIGNED_FROM = 16, 256


def _aligned(matrix: Tensor) -> Tensor:
    """The same matrices with rows that start at multiples of 64 bytes: products with parts of them are 8 % faster."""
    d = matrix.shape[-1]
    if d < ALIGNED_FROM or (matrix.stride(-1) == 1 and matrix.stride(-2) % ALIGNMENT == 0):
        return matrix
    return matrix.new_empty(*matrix.shape[:-1], d + -d % ALIGNMENT)[..., :d].copy_(matrix)


def _t(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.mT


def _square(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.square()


def _logdet_spd(matrix: Tensor) -> Tensor:
    return 2 * torch.linalg.cholesky(matrix).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def factor_from_state(state: dict[str, Tensor]) -> Factor:
    return Eigen(**state) if "values" in state else Inverse(**state)


# ------------------------------------------------------------------------------------------ linear algebra


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a batch; tried again in float64 where float32 does not converge."""
    try:
        return torch.linalg.eigh(matrix)
    except torch.linalg.LinAlgError:
        values, vectors = torch.linalg.eigh(matrix.double())
        return values.to(matrix.dtype), vectors.to(matrix.dtype)


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
    n, on_cpu = damped.shape[-1], free_to_read(damped)
    if on_cpu and n >= BLOCKED_FROM:
        pairs = [_inverse_by_blocks(one) for one in damped]
        inverses = [inverse for inverse, _ in pairs]
        inverse = inverses[0].unsqueeze(0) if len(inverses) == 1 else torch.stack(inverses)
        return inverse, torch.stack([info for _, info in pairs])
    root, info = torch.linalg.cholesky_ex(damped)
    identity = torch.eye(n, dtype=damped.dtype, device=damped.device)
    if not on_cpu:  # cholesky_inverse would read its error flag
        return torch.cholesky_solve(identity, root), info
    if info.any():
        root = torch.where((info == 0)[:, None, None], root, identity)  # the CPU's routine raises on a zero pivot
    return torch.cholesky_inverse(root), info


def free_to_read(flag: Tensor) -> bool:
    """Whether reading a tensor's value costs nothing; on an accelerator it waits for everything queued."""
    return flag.device.type == "cpu"


def inverse_spd(matrix: Tensor, shift: Damping) -> tuple[Tensor, Tensor]:
    """((matrix + shift I)^-1, ok) for a batch [g, d, d]; ok is a 0-d bool tensor, no host sync.

    shift: a number or a tensor [g]. Where Cholesky fails the answer is I / (trace + shift), which never
    overestimates the inverse, and ok is False.
    """
    damped = matrix.clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    diagonal.add_(shift.to(damped.dtype).reshape(-1, 1) if isinstance(shift, Tensor) else shift)
    inverse, info = _inverse_and_info(damped)
    fine = (info == 0) & torch.isfinite(inverse.diagonal(dim1=-2, dim2=-1)).all(-1)
    if not free_to_read(fine) or not fine.all():
        identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        bound = identity / diagonal.sum(-1).clamp_min(torch.finfo(matrix.dtype).tiny)[:, None, None]
        inverse = torch.where(fine[:, None, None], inverse, bound)
    return inverse, fine.all()
