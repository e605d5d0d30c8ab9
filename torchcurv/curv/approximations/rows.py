"""Rows instead of a matrix: C = V^T V through its rows V, for fewer rows than parameters.

V has one row per sample and signal, sqrt(scale) vec(sum_r s a^T), laid over all layers of the block. Only (a, s) is
kept; neither V nor C is formed:

    f(V^T V) x = f(0) x + V^T U diag((f(c) - f(0)) / c) U^T V x,    V V^T = U diag(c) U^T

with f(c) = 1 / (c + λ) for a step. Such a block has no running average and is not saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchcurv.curv.approximations.factor import Factor
from torchcurv.curv.linalg.symmetric import Damping, eigh, eigvalsh
from torchcurv.curv.statistics.block import Stats
from torchcurv.curv.statistics.inputs import Inputs
from torchcurv.curv.statistics.layer import LayerData

ROW_ELEMENTS = 1 << 25  # elements of the rows of one layer that are formed at once


@dataclass(frozen=True)
class Rows:
    """The rows V, one per sample and signal of each pass, and what is made of them."""

    stats: tuple[Stats, ...]

    def rows_times(self, x: list[Tensor]) -> Tensor:
        """V x for joined tensors x, one [g, o, d] per layer -> [rows]."""
        parts = []
        for stats in self.stats:
            dots = [use.dot(matrix) for uses, matrix in zip(stats.uses, x, strict=True) for use in uses]
            total = torch.stack(dots).sum(0)
            parts.append((total * root_scale(stats, total)).flatten())
        return torch.cat(parts)

    def rows_transposed_times(self, u: Tensor) -> list[Tensor]:
        """V^T u, one [g, o, d] per layer."""
        total = [u.new_zeros(layer.shape) for layer in self.stats[0].layers]
        start = 0
        for stats in self.stats:
            v, n = stats.shape
            weights = u[start : start + v * n].reshape(v, n)
            weights = weights * root_scale(stats, weights)
            start += v * n
            for uses, matrix in zip(stats.uses, total, strict=True):
                for use in uses:
                    matrix += use.combination(weights)
        return total

    def dots(self, vectors: Tensor) -> Tensor:
        """V x for the rows x of `vectors` [k, P] -> [rows, k]."""
        return torch.stack([self.rows_times(self._parts(x)) for x in vectors], 1)

    def combinations(self, weights: Tensor) -> Tensor:
        """V^T u for the columns u of `weights` [rows, k] -> [k, P]."""
        parts = [self.rows_transposed_times(u) for u in weights.unbind(1)]
        return torch.stack([torch.cat([x.flatten() for x in part]) for part in parts])

    def _parts(self, x: Tensor) -> list[Tensor]:
        """[P] -> one [g, o, d] per layer."""
        shapes = [torch.Size(layer.shape) for layer in self.stats[0].layers]
        pieces = x.split([shape.numel() for shape in shapes])
        return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def gram(self, other: Rows | None = None) -> Tensor:
        """V W^T for the rows W of this or another space over the same layers, layer by layer: (s·s')(a·a') where there
        is one use at one position, else from the layer's rows."""
        spaces = (self, self if other is None else other)
        total: Tensor | int = 0
        for index in range(len(self.stats[0].layers)):
            uses = [stats.uses[index] for space in spaces for stats in space.stats]
            if not any(uses):
                continue
            alike = {(use.transposed, use.inputs.bias_covered) for own in uses for use in own}
            if len(alike) == 1 and all(len(own) == 1 and own[0].s.shape[2] == 1 for own in uses):
                total = total + _product_gram(self.stats, spaces[1].stats, index)
            else:
                for part in self._output_parts(index):
                    V = torch.cat([stats.layer_rows(index, part) for stats in self.stats])
                    W = V if other is None else torch.cat([stats.layer_rows(index, part) for stats in other.stats])
                    total = total + V @ W.mT
        assert isinstance(total, Tensor)
        return total

    def _output_parts(self, index: int) -> Iterator[slice]:
        """The outputs of a layer, so many at a time that the rows over them stay small."""
        g, o, d = self.stats[0].layers[index].shape
        if any(use.transposed for stats in self.stats for use in stats.uses[index]):
            yield slice(None)  # of a transposed use the outputs are on the other side
            return
        size = max(1, ROW_ELEMENTS // (g * d * row_count(self.stats)))
        for start in range(0, o, size):
            yield slice(start, min(start + size, o))

    # ------------------------------------------------------------------------------ sample by sample

    def samples(self) -> tuple[Tensor, int]:
        """(the sample of every row, how many there are). Chunks of the signals of one pass share their inputs."""
        first: dict[int, int] = {}
        count, places = 0, []
        for stats in self.stats:
            v, n = stats.shape
            key = id(_some_use(stats).inputs)
            if key not in first:
                first[key], count = count, count + n
            places.append(torch.arange(first[key], first[key] + n, device=_some_use(stats).s.device).repeat(v))
        return torch.cat(places), count

    def roots(self) -> Tensor:
        """The square root of its scale for every row."""
        like = [_some_use(stats).s for stats in self.stats]
        pairs = zip(self.stats, like, strict=True)
        return torch.cat([root_scale(stats, s).expand(stats.shape.numel()) for stats, s in pairs])

    def first(self, count: int) -> Any:
        """The rows of so many samples of every pass, scaled to stand for all of them."""
        inputs: dict[int, Inputs] = {}
        some = []
        for stats in self.stats:
            n = stats.shape[1]
            part = slice(min(count, n))
            uses = [
                [LayerData(inputs.setdefault(id(use.inputs), use.inputs.of(part)), use.s[:, part]) for use in own]
                for own in stats.uses
            ]
            some.append(replace(stats, uses=uses, scale=stats.scale * (n / part.stop)))
        return type(self)(tuple(some))


@dataclass(frozen=True)
class JacobianRows(Rows, Factor):
    """A block through its rows; `values` and `vectors` are c and U of V V^T once `damped` with λ = `damping`.

    finite: whether V V^T was; where it was not, C counts as zero.
    """

    values: Tensor | None = None
    vectors: Tensor | None = None
    damping: Tensor | None = None
    finite: Tensor | None = None

    holds_damping: ClassVar[bool] = True
    layer_by_layer: ClassVar[bool] = True

    @property
    def ready(self) -> bool:
        return self.values is not None

    def on(self, layout: Any, name: str, tensors: list[Tensor], *args: Any) -> list[Tensor]:
        return layout.split(each_of_batch(getattr(self, name), layout.join(tensors), *args))

    def scaled(self, factor: Any) -> JacobianRows:
        return JacobianRows(tuple(stats.scaled(factor) for stats in self.stats))

    def state(self) -> dict[str, Tensor]:
        """Nothing: rows belong to one step."""
        return {}

    def damped(self, damping: Damping, double: bool = False) -> tuple[JacobianRows, Tensor]:
        """(the rows with their spectrum, whether it could be computed); double: in float64."""
        gram = self.gram()
        finite = torch.isfinite(gram.sum())
        gram = torch.where(finite, gram, 0)
        values, vectors = (part.to(gram.dtype) for part in eigh(gram.double() if double else gram))
        held = torch.as_tensor(damping, dtype=gram.dtype, device=gram.device)
        # of a Gram matrix none is negative but by rounding
        ok = torch.isfinite(values.sum() + vectors.sum()) & (values.amin() >= -1e-3 * values.amax().clamp_min(0))
        values = torch.where(ok, values.clamp_min(0), values.abs().sum())
        return JacobianRows(self.stats, values, vectors, held, finite), ok

    def solve(self, x: list[Tensor], damping: Damping | None = None) -> list[Tensor]:
        if damping is not None or self.damping is None:
            return self.damped(0.0 if damping is None else damping)[0].solve(x)
        lam = self.damping
        return self._function(x, lambda c: 1 / (c + lam), lambda c: -1 / (lam * (c + lam)), lam)

    def _function(
        self, x: list[Tensor], f: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor], damping: Tensor
    ) -> list[Tensor]:
        """f(C) x; slope: (f(c) - f(0)) / c.

        Where c is far above λ, f(c) x is a small difference of f(0) x and what the rows say, which loses (c / λ)² eps.
        So the parts of x along such rows are taken off first, twice, since once leaves a rounding of x, and multiplied
        by f(c) alone. What is left of rounding is c / λ eps, as in a dense solve.
        """
        assert self.values is not None and self.vectors is not None and self.finite is not None
        c, U = self.values, self.vectors
        large = c > damping
        weights = torch.where(large, 1 / c.where(large, 1), 0)
        first = U.mT @ self.rows_times(x)
        taken = self.rows_transposed_times(U @ (weights * first))
        rest = [a - torch.where(self.finite, b, 0) for a, b in zip(x, taken, strict=True)]
        second = U.mT @ self.rows_times(rest)
        zero = f(torch.zeros_like(damping))
        along = torch.where(large, weights * (f(c) * (first + second) - zero * second), slope(c) * second)
        added = self.rows_transposed_times(U @ along)
        return [zero * a + torch.where(self.finite, b, 0) for a, b in zip(rest, added, strict=True)]

    def matvec(self, x: list[Tensor]) -> list[Tensor]:
        return self.rows_transposed_times(self.rows_times(x))

    def damped_matvec(self, x: list[Tensor], damping: Any = None) -> list[Tensor]:
        return [y + damping * own for y, own in zip(self.matvec(x), x, strict=True)]

    # What follows is for looking: it takes an eigendecomposition of the Gram matrix, V V^T = U diag(c) U^T.

    @property
    def _size(self) -> int:
        return sum(torch.Size(layer.shape).numel() for layer in self.stats[0].layers)

    def sample(self, noise: list[Tensor], damping: Any = None) -> list[Tensor]:
        """(C + λ I)^-1/2 noise."""
        held = self if damping is None else self.damped(damping)[0]
        lam = held.damping
        assert lam is not None

        def slope(c: Tensor) -> Tensor:
            a, b = (c + lam).sqrt(), lam.sqrt()
            return -1 / (a * b * (a + b))

        return held._function(noise, lambda c: (c + lam).rsqrt(), slope, lam)

    def eigvalsh(self) -> Tensor:
        values = eigvalsh(self.gram()).clamp_min(0)
        zeros = values.new_zeros(max(0, self._size - len(values)))
        return torch.cat([zeros, values[max(0, len(values) - self._size) :]])

    def trace(self) -> Tensor:
        return self.gram().diagonal().sum()

    def logdet(self, damping: Any = None) -> Tensor:
        return (self.eigvalsh() + damping).log().sum()

    def inverse_diag(self, damping: Any = None) -> list[Tensor]:
        """Diagonal of (C + λ I)^-1, that is 1/λ - diag(V^T (λ I + V V^T)^-1 V) / λ, one [g, o, d] per layer."""
        held = self.damped(damping)[0]
        assert held.values is not None and held.vectors is not None
        inverse = (held.vectors / (held.values + damping)) @ held.vectors.mT
        diagonals = []
        for k, layer in enumerate(self.stats[0].layers):
            rows = torch.cat([stats.layer_rows(k) for stats in self.stats])
            diagonals.append(((1 - (rows * (inverse @ rows)).sum(0)) / damping).reshape(layer.shape))
        return diagonals

    def diag(self) -> list[Tensor]:
        """sum of the rows' squares, one [g, o, d] per layer."""
        layers = self.stats[0].layers
        squares = [
            sum(stats.layer_rows(k).square().sum(0) for stats in self.stats if stats.uses[k])
            for k in range(len(layers))
        ]
        like = next(x for x in squares if isinstance(x, Tensor))
        return [
            x.reshape(layer.shape) if isinstance(x, Tensor) else like.new_zeros(layer.shape)
            for x, layer in zip(squares, layers, strict=True)
        ]


def each_of_batch(f: Callable[..., list[Tensor]], x: list[Tensor], *args: Any) -> list[Tensor]:
    """f over the leading dimension of [k, g, o, i], or once for [g, o, i]."""
    if x[0].dim() == 3:
        return f(x, *args)
    answers = [f([part[k] for part in x], *args) for k in range(x[0].shape[0])]
    return [torch.stack(parts) for parts in zip(*answers, strict=True)]


def row_count(parts: Sequence[object]) -> int:
    return sum(part.shape.numel() for part in parts if isinstance(part, Stats))


def root_scale(stats: Stats, like: Tensor) -> Tensor:
    return torch.as_tensor(stats.scale, dtype=like.dtype, device=like.device).sqrt()


def _product_gram(all_stats: tuple[Stats, ...], others: tuple[Stats, ...], index: int) -> Tensor:
    """K[(v n), (w m)] = sum_g (s_vn · s_wm)(a_n · a_m + [bias]) over all the passes' rows."""
    a, s = _joined(all_stats, index)
    b, t = (a, s) if others is all_stats else _joined(others, index)
    inputs = all_stats[0].uses[index][0].inputs
    pairs = torch.einsum("ngi,mgi->gnm", a, b) if inputs.weight_covered else 0
    if inputs.bias_covered:
        pairs = pairs + 1
    return (torch.einsum("ngo,mgo->gnm", s, t) * pairs).sum(0)


def _joined(all_stats: tuple[Stats, ...], index: int) -> tuple[Tensor, Tensor]:
    """(a, s) [rows, g, i or o] of a layer, with the square root of the scale in s."""
    uses = [(stats, stats.uses[index][0]) for stats in all_stats]
    a = torch.cat([use.inputs.a[:, 0].repeat(len(use.s), 1, 1) for _, use in uses])
    s = torch.cat([use.s[:, :, 0].flatten(0, 1) * root_scale(stats, use.s) for stats, use in uses])
    return a, s


def _some_use(stats: Stats) -> LayerData:
    return next(use for uses in stats.uses for use in uses)
