"""Rows instead of a matrix: C = V^T V through its rows V, for fewer rows than parameters.

V has one row per sample and signal, sqrt(scale) vec(sum_r s a^T), laid over all layers of the block. Only (a, s) is
kept; neither V nor C is formed:

    (V^T V + λ I)^-1 g = (g - V^T (λ I + V V^T)^-1 V g) / λ

Such a block has no running average and is not saved.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from torchcurv.curv.factor import Damping, eigh, inverse_spd
from torchcurv.curv.layers import Layer
from torchcurv.curv.stats import Stats


@dataclass(frozen=True)
class RowSpace:
    """A block through its rows; `inverse` is (λ I + V V^T)^-1 once `damped` with λ = `damping`.

    finite: whether V V^T was; where it was not, C counts as zero.
    """

    stats: tuple[Stats, ...]
    inverse: Tensor | None = None
    damping: Tensor | None = None
    finite: Tensor | None = None

    def _per_layer(self, x: list[Tensor], stats: Stats) -> Iterable[tuple[int, Tensor]]:
        return ((index, x[index]) for index in range(len(stats.layers)) if stats.inputs[index] is not None)

    def _each(self, x: list[Tensor], stats: Stats) -> Tensor:
        """V x for joined tensors x, one [g, o, d] per layer -> [v n]."""
        total: Tensor | int = 0
        for index, matrix in self._per_layer(x, stats):
            layer, inputs, s = stats.layers[index], stats.inputs[index], stats.signals[index]
            assert inputs is not None and s is not None
            z = _outputs(layer, inputs.a, matrix)
            total = total + torch.einsum("vnrgo,nrgo->vn", s, z)
        assert isinstance(total, Tensor)
        return (total * _root_scale(stats, total)).flatten()

    def rows_times(self, x: list[Tensor]) -> Tensor:
        return torch.cat([self._each(x, stats) for stats in self.stats])

    def rows_transposed_times(self, u: Tensor) -> list[Tensor]:
        """V^T u, one [g, o, d] per layer."""
        layers = self.stats[0].layers
        total: list[Tensor] = [u.new_zeros(layer.shape) for layer in layers]
        start = 0
        for stats in self.stats:
            v, n = next(s for s in stats.signals if s is not None).shape[:2]
            weights = u[start : start + v * n].reshape(v, n)
            weights = weights * _root_scale(stats, weights)
            start += v * n
            for index, matrix in self._per_layer(total, stats):
                layer, inputs, s = layers[index], stats.inputs[index], stats.signals[index]
                assert inputs is not None and s is not None
                matrix += _gradient(layer, inputs.a, torch.einsum("vnrgo,vn->nrgo", s, weights))
        return total

    def gram(self) -> Tensor:
        """V V^T, layer by layer: (s·s')(a·a') where there is one position, else from that layer's rows."""
        total: Tensor | int = 0
        for index in range(len(self.stats[0].layers)):
            reached = [stats for stats in self.stats if stats.inputs[index] is not None]
            if not reached:
                continue
            signals = [s.signals[index] for s in reached]
            single = all(s is not None and s.shape[2] == 1 for s in signals)
            if single and len(reached) == len(self.stats):
                total = total + _product_gram(self.stats, index)
            else:
                rows = torch.cat([stats.layer_rows(index) for stats in self.stats])
                total = total + rows @ rows.mT
        assert isinstance(total, Tensor)
        return total

    def damped(self, damping: Damping, double: bool = False) -> tuple[RowSpace, Tensor]:
        """(the rows with their inverse, whether it could be computed); double: in float64."""
        gram = self.gram()
        finite = torch.isfinite(gram.sum())
        gram = torch.where(finite, gram, 0)
        inverse, ok = inverse_spd((gram.double() if double else gram).unsqueeze(0), damping)
        held = torch.as_tensor(damping, dtype=gram.dtype, device=gram.device)
        return RowSpace(self.stats, inverse[0].to(gram.dtype), held, finite), ok

    def solve(self, x: list[Tensor], damping: Damping | None = None) -> list[Tensor]:
        if damping is not None or self.inverse is None:
            return self.damped(0.0 if damping is None else damping)[0].solve(x)
        assert self.damping is not None and self.finite is not None
        correction = self.rows_transposed_times(self.inverse @ self.rows_times(x))
        return [(g - torch.where(self.finite, c, 0)) / self.damping for g, c in zip(x, correction, strict=True)]

    def matvec(self, x: list[Tensor]) -> list[Tensor]:
        return self.rows_transposed_times(self.rows_times(x))

    # What follows is for looking: it takes an eigendecomposition of the Gram matrix, V V^T = U diag(l) U^T.

    @property
    def _size(self) -> int:
        return sum(torch.Size(layer.shape).numel() for layer in self.stats[0].layers)

    def sample(self, noise: list[Tensor], damping: Damping) -> list[Tensor]:
        """(C + λ I)^-1/2 noise = noise / sqrt(λ) + V^T U diag((1/sqrt(l + λ) - 1/sqrt(λ)) / l) U^T V noise."""
        values, vectors = eigh(self.gram())
        kept = values > values.amax() * len(values) * torch.finfo(values.dtype).eps
        root = torch.as_tensor(damping, dtype=values.dtype, device=values.device).rsqrt()
        change = torch.where(kept, ((values + damping).rsqrt() - root) / values.where(kept, 1), 0)
        correction = self.rows_transposed_times(vectors @ (change * (vectors.mT @ self.rows_times(noise))))
        return [x * root + c for x, c in zip(noise, correction, strict=True)]

    def eigvalsh(self) -> Tensor:
        values = torch.linalg.eigvalsh(self.gram()).clamp_min(0)
        zeros = values.new_zeros(max(0, self._size - len(values)))
        return torch.cat([zeros, values[max(0, len(values) - self._size) :]])

    def trace(self) -> Tensor:
        return self.gram().diagonal().sum()

    def logdet(self, damping: Damping) -> Tensor:
        return (self.eigvalsh() + damping).log().sum()

    def diag(self) -> list[Tensor]:
        """sum of the rows' squares, one [g, o, d] per layer."""
        layers = self.stats[0].layers
        squares = [
            sum(stats.layer_rows(k).square().sum(0) for stats in self.stats if stats.inputs[k] is not None)
            for k in range(len(layers))
        ]
        like = next(x for x in squares if isinstance(x, Tensor))
        return [
            x.reshape(layer.shape) if isinstance(x, Tensor) else like.new_zeros(layer.shape)
            for x, layer in zip(squares, layers, strict=True)
        ]


def _root_scale(stats: Stats, like: Tensor) -> Tensor:
    return torch.as_tensor(stats.scale, dtype=like.dtype, device=like.device).sqrt()


def _outputs(layer: Layer, a: Tensor, matrix: Tensor) -> Tensor:
    """W a + b -> [n, r, g, o] for the joined matrix [g, o, d]."""
    weight, bias = layer.weight, layer.bias
    if weight is None:
        return matrix[..., -1].expand(*a.shape[:2], *matrix.shape[:2])
    z = torch.einsum("nrgi,goi->nrgo", a, matrix[..., : a.shape[-1]])
    return z if bias is None else z + matrix[..., -1]


def _gradient(layer: Layer, a: Tensor, s: Tensor) -> Tensor:
    """sum_{n,r} s a^T -> [g, o, d]."""
    parts = []
    if layer.weight is not None:
        parts.append(torch.einsum("nrgo,nrgi->goi", s, a))
    if layer.bias is not None:
        parts.append(s.sum((0, 1)).unsqueeze(-1))
    return torch.cat(parts, -1)


def _product_gram(all_stats: tuple[Stats, ...], index: int) -> Tensor:
    """K[(v n), (w m)] = sum_g (s_vn · s_wm)(a_n · a_m + [bias]) over all the passes' rows."""
    layer = all_stats[0].layers[index]
    inputs, signals = [], []
    for stats in all_stats:
        inp, s = stats.inputs[index], stats.signals[index]
        assert inp is not None and s is not None
        inputs.append(inp.a[:, 0].repeat(s.shape[0], 1, 1))
        signals.append(s[:, :, 0].flatten(0, 1) * _root_scale(stats, s))
    a, s = torch.cat(inputs), torch.cat(signals)
    pairs = torch.einsum("ngi,mgi->gnm", a, a) if layer.weight is not None else 0
    if layer.bias is not None:
        pairs = pairs + 1
    return (torch.einsum("ngo,mgo->gnm", s, s) * pairs).sum(0)
