"""Which rows, of dimension 0 of the output and of the layers' calls, belong to which sample.

By default each sample has an equal run of rows, one after the other. Where that is not so (flattened or permuted
outputs, a part of the batch, nodes of graphs of several sizes) signals find it: the rows of a sample of the output
send 2^k times what they sent before, k telling which sample it is, and what arrives at a row of a layer is multiplied
by the same number, if it comes from one sample alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchcurv.curv.losses.terms import Terms


class Mark(NamedTuple):
    """What a call is known by in all passes that are alike: numbers of its layer, of the site there, and of its output
    in the graph."""

    layer: int
    site: int
    place: int
    number: int
    shape: tuple[int, ...]
    batch: int


Send = Callable[[Tensor], Mapping[Mark, Tensor]]  # from factors of the output's rows [m] to what arrives at rows [b, e]


@dataclass(frozen=True)
class Rows:
    """labels: the sample of each row of the output [m]. output: the rows of each sample [n, k]. calls: those of a call.

    A sample with fewer rows than others has -1 in the place of those that it lacks. idle: rows of a call that no
    sample reached. lasting: whether all this holds for other batches of the same structure, as far as it shows.
    """

    labels: Tensor
    output: Tensor
    calls: dict[Mark, Tensor]
    idle: dict[Mark, Tensor]
    lasting: bool

    @property
    def n(self) -> int:
        return len(self.output)

    def grouped(self, terms: Terms) -> Terms:
        """The terms [n, t, c] of these samples, from those of equal runs."""
        missing = self.output < 0

        def group(x: Tensor) -> Tensor:
            each = x.reshape(len(self.labels), -1)[self.output.clamp_min(0).flatten()]
            if terms.formula.elementwise:
                return each.reshape(self.n, 1, -1)
            return each.reshape(self.n, -1, *x.shape[2:])

        weights = terms.weights
        if weights is not None and terms.formula.elementwise:
            weights = (weights if weights.dim() == 3 else weights.unsqueeze(-1)).expand_as(terms.f)
        if bool(missing.any()) and weights is None:
            weights = torch.ones_like(terms.f if terms.formula.elementwise else terms.f[..., 0])
        if weights is not None:
            weights = group(weights)
            kept = ~missing.repeat_interleave(weights[0].numel() // missing.shape[1], 1)
            weights = weights * kept.reshape(weights.shape).to(weights.device)
        y, arrived = terms.target, terms.arrived
        return replace(
            terms,
            f=group(terms.f),
            weights=weights,
            target=None if y is None else lambda: group(y()),
            arrived=None if arrived is None else lambda: group(arrived()),
        )

    def ungrouped(self, signal: Tensor, like: Tensor) -> Tensor:
        """A signal [n, t, c] of these samples in the layout `like`, that of equal runs."""
        present = self.output.flatten() >= 0
        each = signal.reshape(self.output.numel(), -1)
        out = each.new_zeros(len(self.labels), each.shape[1])
        out[self.output.flatten()[present]] = each[present]
        return out.reshape(like.shape)


# ------------------------------------------------------------------------------------------- finding them


def numbered(samples: Any, m: int) -> Tensor:
    """What a user says of the samples of the rows of an output, as numbers 0 to n - 1 [m]."""
    if not isinstance(samples, Tensor) or samples.dtype != torch.long or samples.shape != (m,):
        what = f"{samples.dtype} {tuple(samples.shape)}" if isinstance(samples, Tensor) else type(samples).__name__
        raise ValueError(
            f"observe: samples= is a {what}; pass a LongTensor [{m}], the number of the sample that each row of the "
            "output belongs to"
        )
    return samples.cpu().unique(return_inverse=True)[1]


def candidates(m: int, batches: set[int]) -> Iterator[Tensor]:
    """Samples [m] that the rows of an output may belong to, the finest first. batches: those of the layers' calls."""
    yield torch.arange(m)
    for n in sorted(batches, reverse=True):
        if 1 < n < m and m % n == 0:
            yield torch.arange(m) // (m // n)
            yield torch.arange(m) % n
    if batches == {1} and m > 1:
        yield torch.zeros(m, dtype=torch.long)


def alone(labels: Tensor) -> Rows:
    """The samples of the output's rows, where nothing is known of the calls."""
    return Rows(labels, _table(labels, int(labels.max()) + 1), {}, {}, False)


def found(send: Send, labels: Tensor) -> tuple[Rows, set[Mark]]:
    """The rows of the calls for these samples of the output's rows, and calls of which a row has a part in several."""
    n = int(labels.max()) + 1
    read = _decoded(send, labels)
    calls, idle, mixed, lasting = {}, {}, set(), True
    for mark, own in read.items():
        if own is None or bool((own >= n).any()):
            mixed.add(mark)
            continue
        calls[mark], idle[mark], sure = _filled(_table(own, n), (own < 0).nonzero().flatten(), n)
        lasting = lasting and sure
    return Rows(labels, _table(labels, n), calls, idle, lasting), mixed


def depending(carry: Callable[[Tensor], Tensor | None], b: int) -> Tensor | None:
    """Samples [m] of the output's rows, where each depends on one row of a call alone: that is its sample.

    carry: from factors of the call's rows [b] to how the output's rows change with them [m, e]; None: not known.
    """
    if carry(torch.ones(b, dtype=torch.float64)) is None:
        return None

    def send(factors: Tensor) -> dict[Any, Tensor]:
        change = carry(factors)
        return {} if change is None else {(): change}

    own = _decoded(send, torch.arange(b))[()]
    if own is None or bool(((own < 0) | (own >= b)).any()):
        return None
    return own.unique(return_inverse=True)[1]


def _decoded(send: Callable[[Tensor], Mapping[Any, Tensor]], labels: Tensor) -> dict[Any, Tensor | None]:
    """Whose signal arrives at each row, -1 for nobody's; None of what has a row at which that of several does."""
    first = send(torch.ones(len(labels), dtype=torch.float64))
    bits = 2 if torch.float16 in [x.dtype for x in first.values()] else 4  # other types have room for 2^8, and 2^-8
    half = 1 << (bits - 1)
    read: dict[Any, Tensor | None] = {mark: torch.zeros(len(x), dtype=torch.long) for mark, x in first.items()}
    for digit in range(0, max(1, int(labels.max()).bit_length()), bits):
        powers = (labels >> digit) % (2 * half) - half
        second = send(2.0 ** powers.double())
        for mark, before in first.items():
            power, own = _power(before, second[mark]), read[mark]
            read[mark] = None if power is None or own is None else own + ((power + half).clamp_min(0) << digit)
        if all(own is None for own in read.values()):
            break
    nobodys = {mark: (x == 0).all(1).cpu() for mark, x in first.items()}
    return {mark: None if own is None else own.masked_fill(nobodys[mark], -1) for mark, own in read.items()}


def _power(before: Tensor, after: Tensor) -> Tensor | None:
    """k [b] where each row after is 2^k times that before; None where one is not, or where it is not finite."""
    size, scaled = before.norm(dim=1), after.norm(dim=1)
    power = torch.where(size > 0, (scaled / size).log2().round(), 0)
    # Two samples that meet in a row are off by about the row itself. A power of two loses nothing, so that this is
    # far above what is left by sums in another order, in bfloat16 too.
    gap = (after - before * 2.0 ** power.unsqueeze(1)).norm(dim=1)
    if not bool(((gap <= 0.05 * scaled) & power.isfinite()).all()):
        return None
    return power.long().cpu()


def _table(labels: Tensor, n: int) -> Tensor:
    """[n, k]: the rows of each sample, -1 in the place of those that it lacks."""
    counts = torch.bincount(labels[labels >= 0], minlength=n)
    order = labels.argsort(stable=True)[int((labels < 0).sum()) :]
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[labels[order]]
    table = torch.full((n, max(1, int(counts.max()))), -1)
    table[labels[order], place] = order
    return table


def _filled(table: Tensor, idle: Tensor, n: int) -> tuple[Tensor, Tensor, bool]:
    """(the table, rows of no sample, whether other batches have the same).

    A row that sends nothing may belong to no sample, or to one whose signal happens to be zero: where as many are
    idle as are missing they are put there, in any order, since they add nothing.
    """
    missing = table < 0
    lacking = int(missing.sum())
    if not lacking:
        return table, idle, n > 1 or not len(idle)
    if lacking == len(idle):
        return table.masked_scatter(missing, idle), idle[:0], False
    return table, idle, not len(idle)
