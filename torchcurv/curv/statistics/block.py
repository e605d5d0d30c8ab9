"""Stats: what a block's layers saw in one pass, as answers to the questions approximations ask.

    a [n, r, g, i]       what came in           (the 1 of a bias is kept implicit)
    s [v, n, r, g, o]    what was sent back
    block = scale * sum_{v,n} vec(sum_r s a^T) vec(sum_r s a^T)^T

A `LayerData` is one pair (a, s) of a layer; a weight that is used in two ways (an embedding and its output head) has
two, whose rows add up. All answers are sums over signals, samples and positions in float32 or better, so that chunks
of signals, micro-batches and ranks add up. Of a large symmetric answer the lower triangle counts; above it there may
be zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.linalg.block_diagonal import times
from torchcurv.curv.statistics.layer import CHUNK, LayerData, added_up


@dataclass
class Stats:
    """A block's uses for some of the signals of one pass.

    uses: those of each layer of the block; none for a layer that was not reached.
    scale: factor of the whole (R times the factor that reached the loss), a number or a 0-d tensor.
    share: the fraction of the pass's signals that is here.
    """

    uses: list[list[LayerData]]
    scale: Tensor | float
    share: float
    layers: list[Layer]

    @property
    def edited(self) -> bool:
        """Whether inputs were edited in place since."""
        return any(use.inputs.edited for uses in self.uses for use in uses)

    def scaled(self, factor: Tensor | float) -> Stats:
        return replace(self, scale=self.scale * factor)

    def only_layer(self, question: str) -> list[LayerData]:
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

    def parts(self, rows: int) -> Iterator[Stats]:
        """Some signals at a time, of about so many rows."""
        v, n = self.shape
        size = max(1, rows // n)
        for k in range(0, v, size):
            yield replace(self, uses=[[LayerData(use.inputs, use.s[k : k + size]) for use in own] for own in self.uses])

    def squares(self, left: Tensor | None = None, right: Tensor | None = None) -> Tensor:
        """sum_{v,n} (sum_r left^T s a^T right)^2 [g, o, d], elementwise."""
        uses = self.only_layer("squares")
        short = uses[0].squares(left, right, self.scale) if len(uses) == 1 else None
        if short is not None:
            return short
        rows: Iterable[Tensor] = _row_chunks(uses)
        if left is not None and right is not None:
            rows = (times(times(part.mT, left).mT, right) for part in rows)
        return added_up(part.square().sum(0) for part in rows).mul_(self.scale)

    def unit_blocks(self) -> Tensor:
        """sum_{v,n} row row^T per output unit [g, o, d, d]."""
        chunks = _row_chunks(self.only_layer("unit_blocks"))
        return added_up(torch.einsum("bgoi,bgoj->goij", rows, rows) for rows in chunks) * self.scale

    def row_chunks(self) -> Iterator[Tensor]:
        """The per-sample, per-signal gradients [b, P] of all layers, some at a time, without the scale."""
        v, n = self.shape
        size = max(1, 16 * CHUNK // sum(torch.Size(layer.shape).numel() for layer in self.layers))
        for k in range(v):
            for start in range(0, n, size):
                part = slice(start, min(start + size, n))
                rows = [self._layer_rows(index, slice(k, k + 1), part) for index in range(len(self.layers))]
                yield rows[0] if len(rows) == 1 else torch.cat(rows, -1)

    def layer_rows(self, index: int, outputs: slice = slice(None)) -> Tensor:
        """All the rows [v n, P_layer] of one layer, or of some of its outputs, with the square root of the scale."""
        v, n = self.shape
        rows = self._layer_rows(index, slice(0, v), slice(0, n), outputs)
        return rows * torch.as_tensor(self.scale, dtype=rows.dtype, device=rows.device).sqrt()

    def _layer_rows(self, index: int, signals: slice, samples: slice, outputs: slice = slice(None)) -> Tensor:
        if not self.uses[index]:
            like = next(use for uses in self.uses for use in uses).s
            count = (signals.stop - signals.start) * (samples.stop - samples.start)
            g, o, d = self.layers[index].shape
            return like.new_zeros(count, g * len(range(o)[outputs]) * d)
        return torch.cat([chunk.flatten(1) for chunk in _row_chunks(self.uses[index], signals, samples, outputs)])


def _row_chunks(
    uses: list[LayerData], signals: slice = slice(None), samples: slice = slice(None), outputs: slice = slice(None)
) -> Iterator[Tensor]:
    """The rows of all uses of a layer, added up."""
    for parts in zip(*(use.row_chunks(signals, samples, outputs) for use in uses), strict=True):
        yield parts[0] if len(parts) == 1 else sum(parts[1:], parts[0])
