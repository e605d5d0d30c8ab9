"""Inputs: what came into one layer in one pass, and the products it enters.

    a [n, r, g, i]       the 1 of a bias is kept implicit

It is read from the module when first asked for, and never where a question has a shorter answer.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from torchcurv.curv.graph import version_of
from torchcurv.curv.layers.layer import Layer, ParameterUse
from torchcurv.curv.layers.one_hot import Tokens
from torchcurv.curv.layers.view import Arguments
from torchcurv.curv.numerics import at_least_float32
from torchcurv.curv.statistics.gram import block_gram, position_gram

PATCH_ELEMENTS = 1 << 22  # elements of layer inputs read at once where they are not kept


class Inputs:
    """The inputs of one layer in one pass: read from the module when first asked, shared by all signals.

    calls: modules, and what each was given, [n k, ...]; repeated calls and k are further positions r.
    weights: term weights [n, t], or None; they reach the positions where r = t, else the sample as a whole.
    present: [n, r], whether a sample has the position, where some have fewer; None: all have all.
    """

    def __init__(
        self,
        layer: Layer,
        site: ParameterUse,
        calls: list[tuple[nn.Module, Arguments]],
        n: int,
        weights: Tensor | None,
        present: Tensor | None = None,
    ) -> None:
        self.present = present
        self.whole: Inputs | None = None  # one sample, where these are as many of it
        self.layer, self.site, self.calls, self.n, self.weights = layer, site, calls, n, weights
        self.view = site.view
        self._versions = self._current_versions
        self.weight_covered = layer.weight is not None
        self.bias_covered = layer.bias is not None and site.bias is not None
        self.bias_column = layer.bias is not None and not site.transposed  # zeros where this site has no bias

    @classmethod
    def made(
        cls, layer: Layer, site: ParameterUse, a: Tensor, weights: Tensor | None, present: Tensor | None
    ) -> Inputs:
        """Of inputs that were read already."""
        inputs = cls(layer, site, [], len(a), weights, present)
        inputs.__dict__["_all"] = a
        return inputs

    @property
    def _current_versions(self) -> list[int]:
        return [version_of(x) for _, given in self.calls for x in given]

    @property
    def edited(self) -> bool:
        """Whether what came in was edited in place since."""
        return self._versions != self._current_versions

    def _read(self, module: nn.Module, x: Arguments) -> Tensor | Tokens:
        read = self.view.inputs(module, *x)
        if isinstance(read, Tokens):
            return read.per_sample(self.n)
        return at_least_float32(read).reshape(self.n, -1, *read.shape[-2:])

    @cached_property
    def _all(self) -> Any:
        read = [self._read(module, x) for module, x in self.calls]
        tokens = [part for part in read if isinstance(part, Tokens)]
        if len(read) == 1:
            all_calls = read[0]
        elif tokens:
            all_calls = Tokens.joined(tokens)
        else:
            all_calls = torch.cat([part for part in read if isinstance(part, Tensor)], 1)
        if self.present is None:
            return all_calls
        if isinstance(all_calls, Tokens):
            return replace(all_calls, weight=all_calls.weight * self.present.unsqueeze(-1))
        return all_calls * self.present[..., None, None]

    @property
    def tokens(self) -> Tokens | None:
        """The inputs as tokens, where they are one-hot rows over a vocabulary."""
        return self._all if isinstance(self._all, Tokens) else None

    @property
    def a(self) -> Tensor:
        return self._all if self.tokens is None else self.tokens.dense()

    def part(self, samples: slice) -> Tensor:
        """a of some of the samples."""
        return self._all[samples] if self.tokens is None else self.tokens.of(samples).dense()

    def of(self, samples: slice) -> Inputs:
        """The inputs of some of the samples, read already."""
        n = len(range(self.n)[samples])
        weights, present = (None if x is None else x[samples] for x in (self.weights, self.present))
        some = Inputs(self.layer, self.site, [], n, weights, present)
        some.__dict__["_all"] = self._all[samples] if self.tokens is None else self.tokens.of(samples)
        return some

    def averaged(self) -> Inputs:
        """One sample: the mean of all, position by position."""
        a = self.a
        w = self._weights(a.shape[1])
        if w is None:
            mean = a.mean(0, keepdim=True)
        else:
            w = w.to(a.dtype)
            total = w.sum(0).clamp_min(torch.finfo(a.dtype).tiny)
            mean = torch.einsum("nr,nrgi->rgi", w, a).div(total[:, None, None]).unsqueeze(0)
        return Inputs.made(self.layer, self.site, mean, None, None)

    @property
    def with_ones(self) -> Tensor:
        """a with the columns that the joined parameters have: inputs if the weight is covered, 1 for the bias."""
        return self._with_bias(self.a)

    def without_bias(self) -> Inputs:
        """The same inputs with zeros in the place of the 1 of the bias."""
        other = copy(self)
        other.__dict__.pop("_covs", None)
        other.bias_covered = False
        return other

    def rows(self) -> tuple[Tensor, Tensor]:
        """(sqrt(w) a [g, n r, d], sum w), whose products `cov` sums; they share no memory with what came in."""
        a = self.with_ones
        w = self._weights(a.shape[1])
        if w is None:
            a, count = a.clone(), a.new_full((), float(a.shape[0] * a.shape[1]))
        else:
            w = w.to(a.dtype)
            a, count = a * w.sqrt()[..., None, None], w.sum()
        return a.flatten(0, 1).transpose(0, 1), count

    def _with_bias(self, a: Tensor) -> Tensor:
        parts = [a] if self.weight_covered else []
        if self.bias_column:
            parts.append(torch.full_like(a[..., :1], float(self.bias_covered)))
        return torch.cat(parts, -1)

    @cached_property
    def mean(self) -> Tensor | Tokens:
        """mean_r a [n, 1, g, i]."""
        read = self.view.mean_input
        if self.present is not None:
            return self._mean_of_present(self.present)
        if read is not None and len(self.calls) == 1:
            module, x = self.calls[0]
            if len(x[0]) == self.n:
                return read(module, at_least_float32(x[0]))
        return self._all.mean(1, keepdim=True) if self.tokens is None else self.tokens.mean()

    def _mean_of_present(self, present: Tensor) -> Tensor | Tokens:
        """`mean` where samples have not all positions; the inputs of those that are missing are zero."""
        more = present.shape[1] / present.sum(1).clamp_min(1)
        if self.tokens is None:
            return self._all.mean(1, keepdim=True) * more[:, None, None, None].to(self._all.dtype)
        mean = self.tokens.mean()
        return replace(mean, weight=mean.weight * more[:, None, None].to(mean.weight.dtype))

    def _weights(self, positions: int) -> Tensor | None:
        weights, present = self.weights, self.present
        if present is not None and (positions == 1 or present.shape[1] != positions):
            present = present.any(1, keepdim=True).expand(-1, positions)
        if weights is None:
            return None if present is None else present.to(torch.float32)
        if weights.shape[1] != positions:
            weights = weights.mean(1, keepdim=True).expand(-1, positions)
        return weights if present is None else weights * present

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
        layer, first = self.layer, self.calls[0][1][0] if self.calls else self.a
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
        plain = self.weights is None and self.present is None
        if sharing == "expand" and plain and read is not None and len(self.calls) == 1:
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
        if self.view.tokens and self.tokens is not None:  # regrouped, they are dense
            return self.gradient(s), self.tokens.weight.square().sum()
        if not self.calls:
            return self.gradient(s), self.a.square().sum()
        module, x = self.calls[0]
        read: Callable[..., Any] = self.view.inputs
        if "_all" in self.__dict__ or self.view.batch_dependent or len(self.calls) > 1 or len(x) > 1:
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


def repeated(inputs: Inputs, n: int) -> Inputs:
    """The inputs of one sample as those of n, without copies."""
    more = Inputs(inputs.layer, inputs.site, inputs.calls, n, None)
    more.whole = inputs
    tokens = inputs.tokens
    more.__dict__["_all"] = inputs.a.expand(n, -1, -1, -1) if tokens is None else tokens.repeated(n)
    return more


def given_of(inputs: Inputs) -> tuple[Any, ...]:
    """What `inputs_from` makes equal ones of: what modules were given, which may be many times smaller than what is
    read of it; what was read, where that depends on buffers of the module, or is all there is."""
    read = None if inputs.calls and inputs.view.mode is None else inputs._all
    calls = inputs.calls if read is None else []
    return inputs.layer, inputs.site, calls, inputs.n, inputs.weights, inputs.present, read, inputs.whole


def inputs_from(
    layer: Layer,
    site: ParameterUse,
    calls: list[tuple[nn.Module, Arguments]],
    n: int,
    weights: Tensor | None,
    present: Tensor | None,
    read: Any,
    whole: Inputs | None,
) -> Inputs:
    """Inputs as `given_of` says; read: what was read of the calls already."""
    if whole is not None:
        return repeated(whole, n)
    inputs = Inputs(layer, site, calls, n, weights, present)
    if read is not None:
        inputs.__dict__["_all"] = read
    return inputs
