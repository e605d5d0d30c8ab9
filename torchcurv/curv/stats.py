"""Stats: what a block's layers saw in one pass, as answers to the questions approximations ask.

    a [n, r, g, i]       what came in           (the 1 of a bias is kept implicit)
    s [v, n, r, g, o]    what was sent back
    block = scale * sum_{v,n} vec(sum_r s a^T) vec(sum_r s a^T)^T

All answers are sums over signals, samples and positions in float32 or better, so that chunks of signals,
micro-batches and ranks add up. Of a large symmetric answer the lower triangle counts; above it there may be zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from torchcurv.curv.layers import Layer
from torchcurv.curv.losses import at_least_float32

CHUNK = 1 << 18  # elements of per-sample gradients formed at a time: they stay in a core's cache
SYMMETRIC_FROM, COLUMNS = 512, 256  # a Gram matrix this large is formed by blocks of columns, 20-30 % cheaper


# ----------------------------------------------------------------------------------------------- sums


def gram(x: Tensor, out: Tensor | None = None) -> Tensor:
    """x^T x for x [k, d], into `out` if given.

    A large one is formed by blocks of columns, each times the columns up to it, and the blocks above the diagonal
    stay zero: whoever factors a statistic reads its lower triangle.
    """
    d = x.shape[1]
    if d < SYMMETRIC_FROM or x.is_cuda:
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
    if not mergeable and x.stride(1) == 1 and r > d and not x.is_cuda:  # channels first: one product per sample
        out[0].addbmm_(x.mT, x)
    else:
        gram(x.reshape(n * r, d), out[0])
    return out


# -------------------------------------------------------------------------------------- one layer's inputs


class Inputs:
    """The inputs of one layer in one pass: read from the module when first asked, shared by all signals.

    calls: one tensor per call of the module, each [n k, ...]; repeated calls and k are further positions r.
    weights: term weights [n, t], or None; they reach the positions where r = t, else the sample as a whole.
    """

    def __init__(self, layer: Layer, calls: list[Tensor], n: int, weights: Tensor | None) -> None:
        self.layer, self.calls, self.n, self.weights = layer, calls, n, weights
        self.module, self.view = layer.modules[0], layer.view

    def _per_sample(self, a: Tensor) -> Tensor:
        return at_least_float32(a).reshape(self.n, -1, *a.shape[-2:])

    @cached_property
    def a(self) -> Tensor:
        read = [self._per_sample(self.view.inputs(self.module, x)) for x in self.calls]
        return read[0] if len(read) == 1 else torch.cat(read, 1)

    @cached_property
    def mean(self) -> Tensor:
        """mean_r a [n, 1, g, i]."""
        read = self.view.mean_input
        if read is None or len(self.calls) > 1 or self.calls[0].shape[0] != self.n:
            return self.a.mean(1, keepdim=True)
        return read(self.module, at_least_float32(self.calls[0]))

    def _weights(self, positions: int) -> Tensor | None:
        if self.weights is None:
            return None
        aligned = self.weights.shape[1] == positions
        return self.weights if aligned else self.weights.mean(1, keepdim=True).expand(-1, positions)

    def cov(self, sharing: str) -> tuple[Tensor, Tensor]:
        """(sum w a a^T [g, d, d], sum w) over samples, and over positions for "expand"."""
        return self._covs[sharing] if sharing in self._covs else self._covs.setdefault(sharing, self._cov(sharing))

    @cached_property
    def _covs(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {}

    def _cov(self, sharing: str) -> tuple[Tensor, Tensor]:
        layer = self.layer
        first = self.calls[0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        out = torch.zeros(layer.groups, layer.dim, layer.dim, dtype=dtype, device=first.device)
        inner = out if layer.bias is None else out[:, :-1, :-1]
        sums, count = self._moments(sharing, inner if layer.weight is not None else None)
        if layer.bias is not None:
            out[:, -1, -1] = count
            if layer.weight is not None:
                out[:, -1, :-1] = out[:, :-1, -1] = sums
        return out, count

    def _moments(self, sharing: str, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """(sum w a [g, i], sum w); sum w a a^T [g, i, i] goes into the zeros `out`."""
        read = self.view.moments
        if sharing == "expand" and self.weights is None and read is not None and len(self.calls) == 1:
            known = read(self.module, at_least_float32(self.calls[0]))
            if known is not None:
                if out is not None:
                    out.copy_(known[0])
                return known[1], known[1].new_full((), float(known[2]))
        a = self.a if sharing == "expand" else self.mean
        n, r = a.shape[:2]
        w = self._weights(r)
        if w is None:
            sums, count = a.sum((0, 1)), a.new_full((), float(n * r))
        else:
            w = w.to(a.dtype)
            sums, count = torch.einsum("nrgi,nr->gi", a, w), w.sum()
            a = a * w.sqrt()[..., None, None]
        if out is not None:
            position_gram(a, out)
        return sums, count


# ----------------------------------------------------------------------------------------------- stats


@dataclass
class Stats:
    """A block's inputs and signals for some of the signals of one pass.

    inputs, signals: one entry per layer of the block; a layer that was not reached has None.
    scale: factor of the whole (R times the factor that reached the loss), a number or a 0-d tensor.
    share: the fraction of the pass's signals that is here.
    """

    inputs: list[Inputs | None]
    signals: list[Tensor | None]
    scale: Tensor | float
    share: float
    layers: list[Layer]

    def _single(self, question: str) -> tuple[Inputs, Tensor]:
        if len(self.layers) != 1:
            raise ValueError(
                f"{question} was asked of a block of {len(self.layers)} layers, but is known per layer only: "
                'write approx="full" for a block of several layers'
            )
        (inputs,), (s,) = self.inputs, self.signals
        assert inputs is not None and s is not None
        return inputs, s

    def input_cov(self, sharing: str = "expand") -> tuple[Tensor, Tensor]:
        """(sum w a a^T [g, d, d], sum w): A = first / second."""
        cov, count = self._single("input_cov")[0].cov(sharing)
        return (cov, count) if self.share == 1 else (cov * self.share, count * self.share)

    def output_cov(self, sharing: str = "expand") -> Tensor:
        """B = sum_{v,n,r} s s^T [g, o, o]; for "reduce" the positions are summed first."""
        s = self._single("output_cov")[1]
        s = s.sum(2, keepdim=True) if sharing == "reduce" and s.shape[2] > 1 else s
        return position_gram(s.flatten(0, 1)).mul_(self.scale)

    def squares(self, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
        """sum_{v,n} (sum_r left^T s a^T right)^2 [g, o, d], elementwise."""
        inputs, s = self._single("squares")
        layer = self.layers[0]
        if left is not None:
            s = torch.einsum("vnrgo,gop->vnrgp", s, left)
        a = inputs.a if right is None else torch.einsum("nrgi,gij->nrgj", _with_ones(inputs), right)
        explicit = layer.weight is not None or right is not None
        implicit_bias = layer.bias is not None and right is None
        if s.shape[2] > 1:
            return _added(rows.square_().sum(0) for rows in _row_chunks(s, a, explicit, implicit_bias)).mul_(self.scale)
        # One position: the square of a product is the product of the squares.
        squared = s.squeeze(2).square().sum(0).mul_(self.scale)
        width = a.shape[-1] * explicit
        total = squared.new_empty(*squared.shape[1:], width + implicit_bias)
        if explicit:
            _paired(squared, a.squeeze(1).square(), total[..., :width])
        if implicit_bias:
            torch.sum(squared, 0, out=total[..., -1])
        return total

    def unit_blocks(self) -> Tensor:
        """sum_{v,n} row row^T per output unit [g, o, d, d]."""
        inputs, s = self._single("unit_blocks")
        layer = self.layers[0]
        chunks = _row_chunks(s, inputs.a, layer.weight is not None, layer.bias is not None)
        return _added(torch.einsum("bgoi,bgoj->goij", rows, rows) for rows in chunks) * self.scale

    def row_chunks(self) -> Iterator[Tensor]:
        """The per-sample, per-signal gradients [b, P] of all layers, some at a time, without the scale."""
        reached = next(s for s in self.signals if s is not None)
        v, n = reached.shape[:2]
        size = max(1, 16 * CHUNK // sum(layer.groups * layer.outputs * layer.dim for layer in self.layers))
        for k in range(v):
            for start in range(0, n, size):
                part = slice(start, min(start + size, n))
                rows = [self._layer_rows(index, slice(k, k + 1), part) for index in range(len(self.layers))]
                yield rows[0] if len(rows) == 1 else torch.cat(rows, -1)

    def layer_rows(self, index: int) -> Tensor:
        """All the rows [v n, P_layer] of one layer, with the square root of the scale inside."""
        rows = self._layer_rows(index, slice(None), slice(None))
        return rows * torch.as_tensor(self.scale, dtype=rows.dtype, device=rows.device).sqrt()

    def _layer_rows(self, index: int, signals: slice, samples: slice) -> Tensor:
        layer, inputs, s = self.layers[index], self.inputs[index], self.signals[index]
        if inputs is None or s is None:
            like = next(x for x in self.signals if x is not None)[signals, samples]
            return like.new_zeros(like.shape[0] * like.shape[1], torch.Size(layer.shape).numel())
        a = inputs.a[samples]
        chunks = _row_chunks(s[signals, samples], a, layer.weight is not None, layer.bias is not None)
        return torch.cat([chunk.flatten(1) for chunk in chunks])


def _added(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total.add_(part)
    return total


def _with_ones(inputs: Inputs) -> Tensor:
    """a with the columns that the joined parameters have: inputs if the weight is covered, 1 for the bias."""
    a, layer = inputs.a, inputs.layer
    parts = [a] if layer.weight is not None else []
    if layer.bias is not None:
        parts.append(a.new_ones(*a.shape[:-1], 1))
    return torch.cat(parts, -1)


def _paired(x: Tensor, y: Tensor, out: Tensor) -> None:
    """sum_n x y^T -> [g, o, i] into `out`, for x [n, g, o], y [n, g, i]."""
    if x.shape[1] == 1:
        torch.mm(x[:, 0].mT, y[:, 0], out=out[0])
    else:
        out.copy_(torch.einsum("ngo,ngi->goi", x, y))


def _row_chunks(s: Tensor, a: Tensor, weight: bool, bias: bool) -> Iterator[Tensor]:
    """sum_r s a^T [b, g, o, d], some of the (v, n) at a time, in their order."""
    v, n = s.shape[:2]
    g, o = s.shape[3:]
    size = max(1, CHUNK // (g * o * (a.shape[-1] + bias)))
    for k in range(v):
        for start in range(0, n, size):
            part = s[k, start : start + size]
            columns = []
            if weight:
                columns.append(torch.einsum("brgo,brgi->bgoi", part, a[start : start + size]))
            if bias:
                columns.append(part.sum(1).unsqueeze(-1))
            yield columns[0] if len(columns) == 1 else torch.cat(columns, -1)
