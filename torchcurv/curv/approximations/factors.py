"""Factors: a symmetric matrix C in a form that can be multiplied, inverted, sampled and measured.

Every shape of curvature is a grouped Kronecker product in disguise. The parameters of a block are viewed as
x [..., g, o, i] and C is the product of a left side over o and a right side over i (linalg/block_diagonal.py):

    kfac    g = groups, o = outputs, i = inputs
    unit    g = groups * outputs, o = 1, i = inputs         (left = 1)
    block   g = 1, o = 1, i = all parameters                (left = 1)
    diag    neither left nor right: C is diagonal           (left = right = 1)

    lowrank g = 1, o = 1, i = all parameters                (its eigenvectors one by one)

Two families, and one for what is known of a few directions alone (`LowRankEigen`). `Eigen` holds C = Q diag(values)
Q^T and knows everything for any damping. `KroneckerInverse` holds the explicit inverses of two damped factors: the
fast path, since products with them are plain matrix products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchcurv.curv.approximations.factor import Factor
from torchcurv.curv.linalg.block_diagonal import root, symmetrised, times, times_left
from torchcurv.curv.linalg.symmetric import (
    ALIGNED_FROM,
    ALIGNMENT,
    Damping,
    aligned_empty,
    lower_times,
    times_lower_transposed,
)


def _sandwich(left: Tensor | None, x: Tensor, right: Tensor | None) -> Tensor:
    """left x right over [..., g, o, i], a missing side being the identity."""
    if left is not None:
        x = times_left(left, x)
    return x if right is None else times(x, right)


@dataclass(frozen=True)
class Eigen(Factor):
    """C = Q diag(values) Q^T with Q = left ⊗ right; `damping` is a 0-d tensor added to the values by default.

    absolute: their magnitudes are meant, which are taken when they are read: a pass over memory less.
    """

    values: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    damping: Tensor | None = None
    absolute: bool = False

    @property
    def basis(self) -> tuple[Tensor, Tensor] | None:
        return None if self.left is None or self.right is None else (self.left, self.right)

    def on(self, layout: Any, name: str, tensors: list[Tensor], *args: Any) -> list[Tensor]:
        if not self._is_diagonal:
            return super().on(layout, name, tensors, *args)
        layer = layout.layers[0]  # nothing couples: parameter by parameter
        parts = [replace(self, values=part) for part in layer.split(self.values.reshape(layer.shape))]
        return [getattr(part, name)(t, *args) for part, t in zip(parts, tensors, strict=True)]

    def effective_dimension(self, damping: Any, sides: Callable[[], tuple[Tensor | None, Tensor]]) -> Tensor:
        values = self.values.abs()
        return (values / (values + damping)).sum()

    @property
    def _is_diagonal(self) -> bool:
        """Whether C is diagonal as it stands: then values may have any shape, such as a parameter's own."""
        return self.left is None and self.right is None

    def _apply(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        if self._is_diagonal:
            return f(x)
        shape = x.shape
        x = x.reshape(*shape[:-3], *self.values.shape)
        x = _sandwich(_t(self.left), x, self.right)
        return _sandwich(self.left, f(x), _t(self.right)).reshape(shape)

    def _damped(self, damping: Damping | None) -> Tensor:
        chosen = self.damping if damping is None else damping
        if chosen is None:
            return self._meant
        return self.values.abs().add_(chosen) if self.absolute else self.values + chosen

    @property
    def _meant(self) -> Tensor:
        return self.values.abs() if self.absolute else self.values

    def matvec(self, x: Tensor) -> Tensor:
        """C x for x [..., g, o, i]."""
        return self._apply(x, lambda y: y * self._meant)

    def solve(self, x: Tensor, damping: Damping | None = None) -> Tensor:
        """(C + damping I)^-1 x."""
        damped = self._damped(damping)
        if self._is_diagonal and damped is not self.values and x.shape == damped.shape:
            return torch.div(x, damped, out=damped)  # into the sum just formed
        return self._apply(x, lambda y: y / damped)

    def sample(self, noise: Tensor, damping: Damping | None = None) -> Tensor:
        """Q (values + damping)^-1/2 noise, of covariance (C + damping I)^-1 for standard normal noise."""
        return self.right_of_sample(self.left_of_sample(self.core_of_sample(noise, damping))).reshape(noise.shape)

    def core_of_sample(self, noise: Tensor, damping: Damping | None = None) -> Tensor:
        """What `sample` puts between its left and its right matrix."""
        return noise.reshape(*noise.shape[:-3], *self.values.shape) * self._damped(damping).rsqrt()

    def left_of_sample(self, x: Tensor) -> Tensor:
        return _sandwich(self.left, x, None)

    def right_of_sample(self, x: Tensor) -> Tensor:
        return _sandwich(None, x, _t(self.right))

    def logdet(self, damping: Damping | None = None) -> Tensor:
        return self._damped(damping).log().sum()

    def diag(self) -> Tensor:
        """Diagonal of C [g, o, i]."""
        return _sandwich(_square(self.left), self._meant, _t(_square(self.right)))

    def damped_matvec(self, x: Tensor, damping: Damping | None = None) -> Tensor:
        """(C + damping I) x."""
        return self._apply(x, lambda y: y * self._damped(damping))

    def inverse_diag(self, damping: Damping | None = None) -> Tensor:
        """Diagonal of (C + damping I)^-1 [g, o, i]."""
        return _sandwich(_square(self.left), self._damped(damping).reciprocal(), _t(_square(self.right)))

    def trace(self) -> Tensor:
        return self._meant.sum()

    def eigvalsh(self) -> Tensor:
        return self._meant.flatten().sort().values


@dataclass(frozen=True)
class KroneckerInverse(Factor):
    """(damped C)^-1 = left ⊗ right, both explicit; the damping is inside.

    Sampling and the determinant take a Cholesky factor of the inverse when asked. shape: (o, i), which sides in
    blocks do not tell. damping: the 0-d tensor λ that is inside, for those who ask for λ (C + λ I)^-1.
    """

    right: Tensor
    left: Tensor | None = None
    shape: tuple[int, int] | None = None
    damping: Tensor | None = None

    holds_damping: ClassVar[bool] = True
    symmetric: ClassVar = ("right", "left")

    def __post_init__(self) -> None:
        object.__setattr__(self, "right", _aligned(self.right))

    def _grouped(self, x: Tensor) -> Tensor:
        d = self.right.shape[-1] if self.right.dim() == 3 else x.shape[-1]
        return x.reshape(*x.shape[:-3], self.right.shape[0], -1, d)

    def solve(self, x: Tensor, damping: Damping | None = None) -> Tensor:
        return _sandwich(self.left, self._grouped(x), self.right).reshape(x.shape)

    @property
    def by_columns(self) -> bool:
        """Whether `solve_columns` is there."""
        return self.left is not None and self.right.dim() == 3

    def solve_columns(self, columns: list[Tensor]) -> list[Tensor]:
        """`solve` for an x [..., g, o, i] given by its blocks of columns; needs a left side and a dense right one.

        Weight and bias are neither joined nor cut apart, and the sizes of the products stay those of the weight.
        """
        if len(columns) == 1:
            return [_sandwich(self.left, columns[0], self.right)]
        sizes = [x.shape[-1] for x in columns]
        solved = []
        for right in torch.split_with_sizes(self.right, sizes, -1):
            pairs = zip(columns, torch.split_with_sizes(right, sizes, -2), strict=True)
            (x, block), *wider = sorted(pairs, key=lambda pair: pair[0].shape[-1])  # a sum grows best in a product
            y = x @ block
            for x, block in wider:
                y = y.baddbmm_(x, block) if y.dim() == 3 else y + x @ block
            solved.append(_sandwich(self.left, y, None))
        return solved

    def on(self, layout: Any, name: str, tensors: list[Tensor], *args: Any) -> list[Tensor]:
        if name != "solve" or not self.by_columns:
            return super().on(layout, name, tensors, *args)
        layer = layout.layers[0]
        return layer.uncolumns(self.solve_columns(layer.columns(tensors)))

    def effective_dimension(self, damping: Any, sides: Callable[[], tuple[Tensor | None, Tensor]]) -> Tensor:
        left, right = sides()
        of_right = (symmetrised(right) * self.right).flatten(1).sum(1)
        if left is None or self.left is None:
            return of_right.sum()
        return of_right @ (symmetrised(left) * self.left).flatten(1).sum(1)

    @cached_property
    def roots(self) -> tuple[Tensor | None, Tensor]:
        """(K_left, K_right) with left = K_left K_left^T, right = K_right K_right^T."""
        return None if self.left is None else root(self.left), root(self.right)

    def sample(self, noise: Tensor, damping: Damping | None = None) -> Tensor:
        """K_left noise K_right^T, of covariance left ⊗ right for standard normal noise; `damping` is not read."""
        return self.right_of_sample(self.left_of_sample(self.core_of_sample(noise))).reshape(noise.shape)

    def core_of_sample(self, noise: Tensor, damping: Damping | None = None) -> Tensor:
        """What `sample` puts between its left and its right matrix."""
        return self._grouped(noise)

    def left_of_sample(self, x: Tensor) -> Tensor:
        left = self.roots[0]
        if left is None:
            return x
        return lower_times(left, x) if left.dim() == 3 else times_left(left, x)

    def right_of_sample(self, x: Tensor) -> Tensor:
        right = self.roots[1]
        return times_lower_transposed(x, right) if right.dim() == 3 else times(x, right.mT)

    def damped_matvec(self, x: Tensor, damping: Damping | None = None) -> Tensor:
        """left^-1 x right^-1; `damping` is not read."""
        left, right = (None if one is None else _from_root(one) for one in self.roots)
        assert right is not None
        return _sandwich(left, self._grouped(x), right).reshape(x.shape)

    def inverse_diag(self, damping: Damping | None = None) -> Tensor:
        """Diagonal of the inverse [g, o, i]; `damping` is not read."""
        o, d = (None, None) if self.shape is None else self.shape
        right = _side_diagonal(self.right, d).unsqueeze(-2)
        return right if self.left is None else _side_diagonal(self.left, o).unsqueeze(-1) * right

    def logdet(self, damping: Damping | None = None) -> Tensor:
        """log det of the damped C, that is minus that of the inverse; `damping` is not read."""
        left_root, right_root = self.roots
        right = _logdet_of_root(right_root)
        if self.left is None or left_root is None:
            return -right.sum()
        o, d = (self.left.shape[-1], self.right.shape[-1]) if self.shape is None else self.shape
        return -(right * o + _logdet_of_root(left_root) * d).sum()


@dataclass(frozen=True)
class LowRankEigen(Factor):
    """C = rest I + Σ_k (values_k - rest) e_k e_k^T with orthonormal e_k, the rows of `vectors` [k, P].

    A row of zeros stands for a direction that is not known, of value `rest`, which is 0 by default.
    """

    values: Tensor
    vectors: Tensor
    damping: Tensor | None = None
    rest: Tensor | None = None

    edited: ClassVar[bool] = False  # it reads no inputs

    def effective_dimension(self, damping: Any, sides: Callable[[], tuple[Tensor | None, Tensor]]) -> Tensor:
        values = self.values.abs()  # what is known
        return (values / (values + damping)).sum()

    def scaled(self, factor: Any) -> LowRankEigen:
        return replace(self, values=self.values * factor)

    def _function(self, x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """f(C) x for x [..., g, o, i]."""
        flat, outside = x.flatten(-3), f(self._rest)
        inside = (flat @ self.vectors.mT) * (f(self.values) - outside)
        return (flat * outside + inside @ self.vectors).reshape(x.shape)

    @property
    def _rest(self) -> Tensor:
        return self.values.new_zeros(()) if self.rest is None else self.rest

    def _damped(self, damping: Damping | None) -> Callable[[Tensor], Tensor]:
        chosen = self.damping if damping is None else damping
        return lambda values: values if chosen is None else values + chosen

    def matvec(self, x: Tensor) -> Tensor:
        """C x."""
        return self._function(x, lambda values: values)

    def solve(self, x: Tensor, damping: Damping | None = None) -> Tensor:
        """(C + damping I)^-1 x."""
        damped = self._damped(damping)
        return self._function(x, lambda values: 1 / damped(values))

    def sample(self, noise: Tensor, damping: Damping | None = None) -> Tensor:
        """(C + damping I)^-1/2 noise."""
        damped = self._damped(damping)
        return self._function(noise, lambda values: damped(values).rsqrt())

    def damped_matvec(self, x: Tensor, damping: Damping | None = None) -> Tensor:
        """(C + damping I) x."""
        return self._function(x, self._damped(damping))

    def inverse_diag(self, damping: Damping | None = None) -> Tensor:
        """Diagonal of (C + damping I)^-1 [1, 1, P]."""
        damped = self._damped(damping)
        outside = 1 / damped(self._rest)
        return (outside + (1 / damped(self.values) - outside) @ self.vectors.square())[None, None]

    def logdet(self, damping: Damping | None = None) -> Tensor:
        damped, (k, size) = self._damped(damping), self.vectors.shape
        return damped(self.values).log().sum() + (size - k) * damped(self._rest).log()

    def diag(self) -> Tensor:
        """Diagonal of C [1, 1, P]."""
        return (self._rest + (self.values - self._rest) @ self.vectors.square())[None, None]

    def distance(self, other: LowRankEigen) -> Tensor:
        """norm(C - other) / norm(other) (Frobenius), without `rest`."""
        overlap = (self.vectors @ other.vectors.mT).square()
        square = self.values.square().sum() + other.values.square().sum() - 2 * self.values @ overlap @ other.values
        return square.clamp_min(0).sqrt() / other.values.norm()

    def trace(self) -> Tensor:
        return self.values.sum() + (self.vectors.shape[1] - len(self.values)) * self._rest

    def eigvalsh(self) -> Tensor:
        return torch.cat([self.values, self._rest.expand(self.vectors.shape[1] - len(self.values))]).sort().values


@dataclass(frozen=True)
class InputRows(Factor):
    """C = I ⊗ R^T R through its rows, R^T = Q T: columns = Q [g, d, b], of orthonormal columns, and weights =
    T T^T (T T^T + λ I)^-1 [g, b, b]; damping: λ, a 0-d tensor.

    The fast path for fewer rows than inputs; it solves, and that is all (input_covariance.py). With R in the place of
    Q the same difference would lose (C / λ)² eps where a dense solve loses C / λ eps.
    """

    columns: Tensor
    weights: Tensor
    damping: Tensor

    holds_damping: ClassVar[bool] = True

    def solve(self, x: Tensor, damping: Damping | None = None) -> Tensor:
        """(x - x Q T T^T (T T^T + λ I)^-1 Q^T) / λ for x [..., g, o, d]."""
        return (x - ((x @ self.columns) @ self.weights) @ self.columns.mT) / self.damping


def _aligned(matrix: Tensor) -> Tensor:
    """The same matrices in rows that are aligned."""
    d = matrix.shape[-1]
    if d < ALIGNED_FROM or matrix.dim() > 3 or (matrix.stride(-1) == 1 and matrix.stride(-2) % ALIGNMENT == 0):
        return matrix
    return aligned_empty(matrix.shape, matrix).copy_(matrix)


def _t(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.mT


def _square(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.square()


def _logdet_of_root(root: Tensor) -> Tensor:
    """log det of root root^T [g]; the padding of a side in blocks is 1."""
    return 2 * root.diagonal(dim1=-2, dim2=-1).log().flatten(1).sum(-1)


def _from_root(root: Tensor) -> Tensor:
    """(root root^T)^-1."""
    return root.square().reciprocal() if root.shape[-1] == 1 else torch.cholesky_inverse(root)


def _side_diagonal(side: Tensor, d: int | None) -> Tensor:
    """[g, d] of a side, without the padding of its last block."""
    return side.diagonal(dim1=-2, dim2=-1).flatten(1)[:, :d]
