"""One pair (a, s) of a layer, as answers to questions (block.py has the notation)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.linalg.block_diagonal import times
from torchcurv.curv.linalg.symmetric import aligned_empty, times_squares
from torchcurv.curv.statistics.gram import block_gram, product_gram
from torchcurv.curv.statistics.inputs import Inputs

CHUNK = 1 << 18  # elements of per-sample gradients formed at a time: they stay in a core's cache

# ------------------------------------------------------------------------------------------------- use


@dataclass
class LayerData:
    """One pair (a, s) of a layer. s is [v, n, r, g, o] in the orientation of the site it comes from."""

    inputs: Inputs
    s: Tensor

    @property
    def layer(self) -> Layer:
        return self.inputs.layer

    @property
    def transposed(self) -> bool:
        """Whether the site uses the weight transposed, seen from the layer."""
        return self.inputs.site.transposed

    def joined(self, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """[..., g, o, d] in the orientation of the layer, from what is known for the site's weight and bias."""
        if weight is not None and self.transposed:
            weight = weight.mT
        if bias is None and self.layer.bias is not None:
            bias = self.s.new_zeros(weight.shape[:-1]) if weight is not None else None
        columns = [] if weight is None else [weight]
        if bias is not None:
            columns.append(bias.unsqueeze(-1))
        return columns[0] if len(columns) == 1 else torch.cat(columns, -1)

    def output_cov(self, sharing: str, blocks: int = 1) -> Tensor:
        """sum_{v,n,r} s s^T as a side; for "reduce" the positions are summed first."""
        s = self.s.sum(2, keepdim=True) if sharing == "reduce" and self.s.shape[2] > 1 else self.s
        if self.transposed and self.layer.bias is not None:
            s = F.pad(s, (0, 1))  # on this side lies the bias, which this use does not touch
        return block_gram(s.flatten(0, 1), blocks)

    def row_gram(self, side: str, blocks: int) -> Tensor:
        """sum_{v,n} G G^T ("left") or G^T G ("right") of the rows G = sum_r s a^T [o, d], as a side."""
        n, r, g, o = self.s.shape[1:]
        size = max(1, 16 * CHUNK // (g * max(r, o) * self.layer.shape[-1]))

        def grams() -> Iterator[Tensor]:
            for start in range(0, n, size):
                some = slice(start, start + size)
                a = self.inputs.of(some).with_ones
                for s in self.s[:, some]:
                    yield product_gram(s, a, blocks) if side == "left" else product_gram(a, s, blocks)

        return added_up(grams())

    def row_chunks(
        self, signals: slice = slice(None), samples: slice = slice(None), outputs: slice = slice(None)
    ) -> Iterator[Tensor]:
        """sum_r s a^T [b, g, o, d], some of the (v, n) at a time, in their order."""
        s, inputs = self.s[signals, samples][..., outputs], self.inputs
        start = samples.start or 0
        v, n = s.shape[:2]
        size = max(1, CHUNK // torch.Size(self.layer.shape).numel())
        for k in range(v):
            for at in range(0, n, size):
                part = s[k, at : at + size]
                weight = bias = None
                if inputs.weight_covered:
                    a = inputs.part(slice(start + at, start + at + len(part)))
                    weight = torch.einsum("brgo,brgi->bgoi", part, a)
                if inputs.bias_covered:
                    bias = part.sum(1)
                yield self.joined(weight, bias)

    def dot(self, matrix: Tensor) -> Tensor:
        """<rows, matrix> [v, n] for a joined matrix [g, o, d]."""
        inputs = self.inputs
        weight = matrix[..., : self.layer.features]
        z: Tensor | None = None
        if inputs.weight_covered:
            z = inputs.outputs(weight.mT if self.transposed else weight)
        if inputs.bias_covered:
            bias = matrix[..., -1]
            z = bias.expand(*self.s.shape[1:]) if z is None else z + bias
        assert z is not None
        return torch.einsum("vnrgo,nrgo->vn", self.s, z)

    def combination(self, weights: Tensor) -> Tensor:
        """sum_{v,n} weights[v, n] rows [g, o, d]."""
        s = torch.einsum("vnrgo,vn->nrgo", self.s, weights)
        weight = self.inputs.gradient(s) if self.inputs.weight_covered else None
        return self.joined(weight, s.sum((0, 1)) if self.inputs.bias_covered else None)

    def gradient(self) -> tuple[Tensor, Tensor]:
        """(the gradient of one signal [g, o, d], norm(s) norm(a)), for checking it."""
        s = self.s[0]
        weight, square = None, s.new_zeros(())
        if self.inputs.weight_covered:
            weight, square = self.inputs.gradient_in_parts(s)
        bias = s.sum((0, 1)) if self.inputs.bias_covered else None
        square = square + s.shape[:-1].numel()
        return self.joined(weight, bias), (square * s.square().sum()).sqrt()

    def weighted_squares(self) -> Tensor:
        """sum_{v,n,r} s a² [g, o, d], for an s that is a diagonal of second derivatives."""
        s, inputs = self.s[0] if len(self.s) == 1 else self.s.sum(0), self.inputs
        if inputs.weight_covered and inputs.bias_covered and not self.transposed:
            total = aligned_empty(self.layer.shape, s)
            _paired_squares(s.flatten(0, 1), inputs.a.flatten(0, 1), total[..., :-1])
            torch.sum(s, (0, 1), out=total[..., -1])
            return total
        weight = torch.einsum("nrgo,nrgi->goi", s, inputs.a.square()) if inputs.weight_covered else None
        return self.joined(weight, s.sum((0, 1)) if inputs.bias_covered else None)

    def squares(self, left: Tensor | None, right: Tensor | None, scale: Tensor | float) -> Tensor | None:
        """scale sum_{v,n} (left^T rows right)^2 [g, o, d] by a shorter way than the rows; None where there is none."""
        inputs, s = self.inputs, self.s
        if self.transposed:
            return None
        if left is not None:
            s = rotated(s, left)
        if inputs.tokens is not None and inputs.weight_covered:  # whose side is a diagonal: right is the identity
            squares = inputs.tokens.squared_gradients(s.squeeze(3)).mT.unsqueeze(0)
            return self.joined(squares, s.sum(2).square().sum((0, 1)) if inputs.bias_covered else None).mul_(scale)
        if right is None and self.layer.bias is not None and not inputs.bias_covered:
            return None
        if right is not None:
            a, explicit, implicit_bias = rotated(inputs.with_ones, right), True, False
        else:
            a, explicit, implicit_bias = inputs.a, inputs.weight_covered, inputs.bias_covered
        if s.shape[2] > 1:
            if right is None:
                return None
            chunks = (torch.einsum("brgo,brgi->bgoi", *parts) for k in range(len(s)) for parts in _chunks(s[k], a))
            return added_up(rows.square_().sum(0) for rows in chunks).mul_(scale)
        # One position: the square of a product is the product of the squares.
        squared = s.squeeze(2).square()
        squared = (squared[0] if len(squared) == 1 else squared.sum(0)).mul_(scale)
        width = a.shape[-1] * explicit
        total = aligned_empty((*squared.shape[1:], width + implicit_bias), squared)
        if explicit:
            _paired_squares(squared, a.squeeze(1), total[..., :width])
        if implicit_bias:
            torch.sum(squared, 0, out=total[..., -1])
        return total if right is not None or implicit_bias else self.joined(total, None)


def _chunks(s: Tensor, a: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(s, a) [b, r, g, o or i] of some samples at a time, so few that their products stay in a core's cache."""
    size = max(1, CHUNK // (s.shape[2] * s.shape[3] * a.shape[3]))
    return zip(s.split(size), a.split(size), strict=True)


def rotated(x: Tensor, side: Tensor) -> Tensor:
    """x [..., g, d] times a side."""
    return torch.einsum("...gd,gdp->...gp", x, side) if side.dim() == 3 else times(x.unsqueeze(-2), side).squeeze(-2)


def _paired_squares(x: Tensor, y: Tensor, out: Tensor) -> None:
    """sum_n x (y²)^T -> [g, o, i] into `out`, for x [n, g, o], y [n, g, i]."""
    if x.shape[1] == 1:
        times_squares(x[:, 0].mT, y[:, 0], out[0])
    else:
        out.copy_(torch.einsum("ngo,ngi->goi", x, y.square()))


def added_up(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total.add_(part)
    return total
