"""Stats: what a block's layers saw in one pass, as answers to the questions approximations ask.

    a [n, r, g, i]       what came in           (the 1 of a bias is kept implicit)
    s [v, n, r, g, o]    what was sent back
    block = scale * sum_{v,n} vec(sum_r s a^T) vec(sum_r s a^T)^T

A `Use` is one pair (a, s) of a layer; a weight that is used in two ways (an embedding and its output head) has two,
whose rows add up. All answers are sums over signals, samples and positions in float32 or better, so that chunks of
signals, micro-batches and ranks add up. Of a large symmetric answer the lower triangle counts; above it there may be
zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchcurv.curv.layers import Layer, Site
from torchcurv.curv.losses import at_least_float32
from torchcurv.curv.sides import folded, side_shape, times
from torchcurv.curv.tokens import Tokens
from torchcurv.curv.views import Arguments

CHUNK = 1 << 18  # elements of per-sample gradients formed at a time: they stay in a core's cache
PATCH_ELEMENTS = 1 << 22  # elements of layer inputs read at once where they are not kept
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


def block_gram(x: Tensor, blocks: int) -> Tensor:
    """The diagonal blocks of sum_{n,r} x x^T for x [n, r, g, d], in the shape of a side (sides.py)."""
    g, d = x.shape[2:]
    shape = side_shape(g, d, blocks)
    if blocks == 1:
        return position_gram(x)
    if shape[-1] == 1:
        return x.square().sum((0, 1))[..., None, None]
    parts = folded(x, shape[-1])
    return torch.einsum("nrgkp,nrgkq->gkpq", parts, parts)


# -------------------------------------------------------------------------------------- one layer's inputs


class Inputs:
    """The inputs of one layer in one pass: read from the module when first asked, shared by all signals.

    calls: modules, and what each was given, [n k, ...]; repeated calls and k are further positions r.
    weights: term weights [n, t], or None; they reach the positions where r = t, else the sample as a whole.
    """

    def __init__(
        self, layer: Layer, site: Site, calls: list[tuple[nn.Module, Arguments]], n: int, weights: Tensor | None
    ) -> None:
        self.layer, self.site, self.calls, self.n, self.weights = layer, site, calls, n, weights
        self.view = site.view
        self.weight_covered = layer.weight is not None
        self.bias_covered = layer.bias is not None and site.bias is not None
        self.bias_column = layer.bias is not None and not site.transposed  # zeros where this site has no bias

    def _read(self, module: nn.Module, x: Arguments) -> Tensor | Tokens:
        read = self.view.inputs(module, *x)
        if isinstance(read, Tokens):
            return read.per_sample(self.n)
        return at_least_float32(read).reshape(self.n, -1, *read.shape[-2:])

    @cached_property
    def _all(self) -> Tensor | Tokens:
        read = [self._read(module, x) for module, x in self.calls]
        if len(read) == 1:
            return read[0]
        tokens = [part for part in read if isinstance(part, Tokens)]
        return Tokens.joined(tokens) if tokens else torch.cat([part for part in read if isinstance(part, Tensor)], 1)

    @property
    def tokens(self) -> Tokens | None:
        """The inputs as tokens, where they are one-hot rows over a vocabulary."""
        return self._all if isinstance(self._all, Tokens) else None

    @property
    def a(self) -> Tensor:
        return self._all.dense() if isinstance(self._all, Tokens) else self._all

    def part(self, samples: slice) -> Tensor:
        """a of some of the samples."""
        return self._all.of(samples).dense() if isinstance(self._all, Tokens) else self._all[samples]

    @property
    def with_ones(self) -> Tensor:
        """a with the columns that the joined parameters have: inputs if the weight is covered, 1 for the bias."""
        return self._with_bias(self.a)

    def _with_bias(self, a: Tensor) -> Tensor:
        parts = [a] if self.weight_covered else []
        if self.bias_column:
            parts.append(torch.full_like(a[..., :1], float(self.bias_covered)))
        return torch.cat(parts, -1)

    @cached_property
    def mean(self) -> Tensor | Tokens:
        """mean_r a [n, 1, g, i]."""
        read, (module, x) = self.view.mean_input, self.calls[0]
        if read is not None and len(self.calls) == 1 and len(x[0]) == self.n:
            return read(module, at_least_float32(x[0]))
        return self._all.mean() if isinstance(self._all, Tokens) else self._all.mean(1, keepdim=True)

    def _weights(self, positions: int) -> Tensor | None:
        if self.weights is None:
            return None
        aligned = self.weights.shape[1] == positions
        return self.weights if aligned else self.weights.mean(1, keepdim=True).expand(-1, positions)

    def cov(self, sharing: str, blocks: int = 1) -> tuple[Tensor, Tensor]:
        """(sum w a a^T as a side of that many blocks, sum w) over samples, and over positions for "expand"."""
        key = sharing, blocks
        if key not in self._covs:
            self._covs[key] = self._dense_cov(sharing) if blocks == 1 else self._block_cov(sharing, blocks)
        return self._covs[key]

    @cached_property
    def _covs(self) -> dict[tuple[str, int], tuple[Tensor, Tensor]]:
        return {}

    def _block_cov(self, sharing: str, blocks: int) -> tuple[Tensor, Tensor]:
        read = self._all if sharing == "expand" else self.mean
        w = self._weights(read.positions if isinstance(read, Tokens) else read.shape[1])
        if isinstance(read, Tokens):
            count = read.weight.new_full((), float(len(read.index) * read.positions)) if w is None else w.sum()
            squares = read.square_sums(None if w is None else w.to(read.weight.dtype))
            return squares[None, :, None, None], count.to(squares.dtype)
        a = self._with_bias(read)
        if w is None:
            return block_gram(a, blocks), a.new_full((), float(a.shape[0] * a.shape[1]))
        w = w.to(a.dtype)
        return block_gram(a * w.sqrt()[..., None, None], blocks), w.sum()

    def _dense_cov(self, sharing: str) -> tuple[Tensor, Tensor]:
        layer, first = self.layer, self.calls[0][1][0]
        dtype = torch.promote_types(first.dtype, torch.float32)
        g, o, d = layer.shape
        d = o if self.site.transposed else d
        out = torch.zeros(g, d, d, dtype=dtype, device=first.device)
        inner = out[:, :-1, :-1] if self.bias_column else out
        sums, count = self._moments(sharing, inner if self.weight_covered else None)
        if self.bias_covered:
            out[:, -1, -1] = count
            if self.weight_covered:
                out[:, -1, :-1] = out[:, :-1, -1] = sums
        return out, count

    def _moments(self, sharing: str, out: Tensor | None) -> tuple[Tensor, Tensor]:
        """(sum w a [g, i], sum w); sum w a a^T [g, i, i] goes into the zeros `out`."""
        read = self.view.moments
        if sharing == "expand" and self.weights is None and read is not None and len(self.calls) == 1:
            module, x = self.calls[0]
            known = read(module, at_least_float32(x[0]))
            if known is not None:
                if out is not None:
                    out.copy_(known[0])
                return known[1], known[1].new_full((), float(known[2]))
        a = self.a if sharing == "expand" else self.mean
        assert isinstance(a, Tensor)
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

    # ------------------------------------------------------------- products, in the orientation of the site

    def outputs(self, weight: Tensor) -> Tensor:
        """W a [n, r, g, o] for W [g, o, i]."""
        if self.tokens is not None:
            return self.tokens.rows_of(weight[0].mT).unsqueeze(2)
        return torch.einsum("nrgi,goi->nrgo", self.a, weight)

    def gradient(self, s: Tensor) -> Tensor:
        """sum_{n,r} s a^T [g, o, i] for s [n, r, g, o]."""
        if self.tokens is not None:
            return self.tokens.added_rows(s.squeeze(2)).mT.unsqueeze(0)
        return torch.einsum("nrgo,nrgi->goi", s, self.a)

    def gradient_in_parts(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """(`gradient`, norm(a)²) without keeping a, which may be many times larger than what the module was given."""
        module, x = self.calls[0]
        read: Callable[..., Any] = self.view.inputs
        if self.view.tokens:
            return self.gradient(s), self._all.weight.square().sum()  # type: ignore[union-attr]
        if "_all" in self.__dict__ or self.view.whole or len(self.calls) > 1 or len(x) > 1:
            return self.gradient(s), self.a.square().sum()
        each = len(x[0]) // self.n
        size = max(1, PATCH_ELEMENTS // max(1, read(module, x[0][:each]).numel()))
        total, square = s.new_zeros(self.layer.site_shape(self.site)), s.new_zeros(())
        for start in range(0, self.n, size):
            a = at_least_float32(read(module, x[0][start * each : (start + size) * each]))
            a = a.reshape(-1, s.shape[1], *a.shape[-2:])
            total += torch.einsum("nrgo,nrgi->goi", s[start : start + size], a)
            square += a.square().sum()
        return total, square


# ------------------------------------------------------------------------------------------------- use


@dataclass
class Use:
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

    def row_chunks(self, signals: slice = slice(None), samples: slice = slice(None)) -> Iterator[Tensor]:
        """sum_r s a^T [b, g, o, d], some of the (v, n) at a time, in their order."""
        s, inputs = self.s[signals, samples], self.inputs
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

    def squares(self, left: Tensor | None, right: Tensor | None) -> Tensor | None:
        """sum_{v,n} (left^T rows right)^2 [g, o, d] by a shorter way than the rows; None where there is none."""
        inputs, s = self.inputs, self.s
        if self.transposed:
            return None
        if left is not None:
            s = _rotated(s, left)
        if inputs.tokens is not None and inputs.weight_covered:  # whose side is a diagonal: right is the identity
            squares = inputs.tokens.squared_gradients(s.squeeze(3)).mT.unsqueeze(0)
            return self.joined(squares, s.sum(2).square().sum((0, 1)) if inputs.bias_covered else None)
        if right is not None:
            a, explicit, implicit_bias = _rotated(inputs.with_ones, right), True, False
        else:
            a, explicit, implicit_bias = inputs.a, inputs.weight_covered, inputs.bias_covered
        if s.shape[2] > 1:
            if right is None:
                return None
            chunks = (torch.einsum("brgo,brgi->bgoi", *parts) for k in range(len(s)) for parts in _chunks(s[k], a))
            return _added(rows.square_().sum(0) for rows in chunks)
        # One position: the square of a product is the product of the squares.
        squared = s.squeeze(2).square().sum(0)
        width = a.shape[-1] * explicit
        total = squared.new_empty(*squared.shape[1:], width + implicit_bias)
        if explicit:
            _paired(squared, a.squeeze(1).square(), total[..., :width])
        if implicit_bias:
            torch.sum(squared, 0, out=total[..., -1])
        return total


def _chunks(s: Tensor, a: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """(s, a) [b, r, g, o or i] of some samples at a time, so few that their products stay in a core's cache."""
    size = max(1, CHUNK // (s.shape[2] * s.shape[3] * a.shape[3]))
    return zip(s.split(size), a.split(size), strict=True)


def _rotated(x: Tensor, side: Tensor) -> Tensor:
    """x [..., g, d] times a side."""
    return torch.einsum("...gd,gdp->...gp", x, side) if side.dim() == 3 else times(x.unsqueeze(-2), side).squeeze(-2)


def _paired(x: Tensor, y: Tensor, out: Tensor) -> None:
    """sum_n x y^T -> [g, o, i] into `out`, for x [n, g, o], y [n, g, i]."""
    if x.shape[1] == 1:
        torch.mm(x[:, 0].mT, y[:, 0], out=out[0])
    else:
        out.copy_(torch.einsum("ngo,ngi->goi", x, y))


# ----------------------------------------------------------------------------------------------- stats


@dataclass
class Stats:
    """A block's uses for some of the signals of one pass.

    uses: those of each layer of the block; none for a layer that was not reached.
    scale: factor of the whole (R times the factor that reached the loss), a number or a 0-d tensor.
    share: the fraction of the pass's signals that is here.
    """

    uses: list[list[Use]]
    scale: Tensor | float
    share: float
    layers: list[Layer]

    def only_layer(self, question: str) -> list[Use]:
        """The uses of the one layer of the block."""
        if len(self.layers) != 1:
            raise ValueError(
                f"{question} was asked of a block of {len(self.layers)} layers, but is known per layer only: "
                'write approx="full" for a block of several layers'
            )
        return self.uses[0]

    @property
    def shape(self) -> torch.Size:
        """(v, n)."""
        return next(use for uses in self.uses for use in uses).s.shape[:2]

    def squares(self, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
        """sum_{v,n} (sum_r left^T s a^T right)^2 [g, o, d], elementwise."""
        uses = self.only_layer("squares")
        short = uses[0].squares(left, right) if len(uses) == 1 else None
        if short is not None:
            return short.mul_(self.scale)
        rows: Iterable[Tensor] = _row_chunks(uses)
        if left is not None and right is not None:
            rows = (times(times(part.mT, left).mT, right) for part in rows)
        return _added(part.square().sum(0) for part in rows).mul_(self.scale)

    def unit_blocks(self) -> Tensor:
        """sum_{v,n} row row^T per output unit [g, o, d, d]."""
        chunks = _row_chunks(self.only_layer("unit_blocks"))
        return _added(torch.einsum("bgoi,bgoj->goij", rows, rows) for rows in chunks) * self.scale

    def row_chunks(self) -> Iterator[Tensor]:
        """The per-sample, per-signal gradients [b, P] of all layers, some at a time, without the scale."""
        v, n = self.shape
        size = max(1, 16 * CHUNK // sum(torch.Size(layer.shape).numel() for layer in self.layers))
        for k in range(v):
            for start in range(0, n, size):
                part = slice(start, min(start + size, n))
                rows = [self._layer_rows(index, slice(k, k + 1), part) for index in range(len(self.layers))]
                yield rows[0] if len(rows) == 1 else torch.cat(rows, -1)

    def layer_rows(self, index: int) -> Tensor:
        """All the rows [v n, P_layer] of one layer, with the square root of the scale inside."""
        v, n = self.shape
        rows = self._layer_rows(index, slice(0, v), slice(0, n))
        return rows * torch.as_tensor(self.scale, dtype=rows.dtype, device=rows.device).sqrt()

    def _layer_rows(self, index: int, signals: slice, samples: slice) -> Tensor:
        if not self.uses[index]:
            like = next(use for uses in self.uses for use in uses).s
            count = (signals.stop - signals.start) * (samples.stop - samples.start)
            return like.new_zeros(count, torch.Size(self.layers[index].shape).numel())
        return torch.cat([chunk.flatten(1) for chunk in _row_chunks(self.uses[index], signals, samples)])


def _row_chunks(uses: list[Use], signals: slice = slice(None), samples: slice = slice(None)) -> Iterator[Tensor]:
    """The rows of all uses of a layer, added up."""
    for parts in zip(*(use.row_chunks(signals, samples) for use in uses), strict=True):
        yield parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])


def _added(parts: Iterator[Tensor]) -> Tensor:
    total = next(parts)
    for part in parts:
        total = total.add_(part)
    return total
