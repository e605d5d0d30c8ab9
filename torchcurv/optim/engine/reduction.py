"""What is measured is reduced over processes, just before it is used."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from torchcurv.curv.approximations.base import Tensors
from torchcurv.curv.block.block import Curvature
from torchcurv.curv.distributed import Ranks
from torchcurv.curv.statistics.packing import packed, unpacked

_slots: WeakKeyDictionary[Curvature, dict[str, Tensor]] = WeakKeyDictionary()


def slots_of(block: Curvature) -> dict[str, Tensor]:
    """What a measurement of a block can hold, on the meta device: a process without data knows what to send."""
    if block not in _slots:
        p = block.params[0]
        like = torch.zeros((), dtype=torch.promote_types(p.dtype, torch.float32), device="meta")
        _slots[block] = block.approx.empty(block.layers, like)
    return _slots[block]


def reduce_pending(blocks: list[Curvature], ranks: Ranks, rows_stay: bool = False) -> None:
    """Make what is pending of the blocks that are due that of all processes.

    blocks: the same on every process. Statistics that scale with the loss become the mean, others the sum, as those of
    micro-batches whose losses are divided by their number. A process that measured nothing of a block has zeros, and no
    rows. rows_stay: whether what is of one step stays where it was measured.
    """
    if not blocks or ranks.count == 1:
        return
    if _refused(blocks, ranks):
        return
    moving = [block for block in blocks if not (rows_stay and block.approx.of_one_step)]
    _condense(moving, ranks)
    for block in moving:
        block.pending.scale(1 / ranks.count)
    if moving:
        _collect(moving, ranks)


def _refused(blocks: list[Curvature], ranks: Ranks) -> bool:
    """Whether this process objects to what it measured, and will say so; where another does, an error."""
    device = blocks[0].params[0].device
    for block in blocks:
        block.pending.objection = block.pending.objection or block.pending.edited(block.name)
    objecting = sum(block.pending.objection is not None for block in blocks)
    told = torch.cat([torch.tensor([objecting], device=device), _doubts(blocks, device)])
    ranks.sum_([told])
    objections, doubts = told.tolist()
    for block in blocks:
        block.pending.settle_doubts(any_right=doubts > 0)
    if objections + doubts and all(block.pending.objection is None for block in blocks):
        raise RuntimeError("another process refuses what it measured, and its message says why: no process steps")
    return objections + doubts > 0


def _doubts(blocks: list[Curvature], device: torch.device) -> Tensor:
    """How many doubts turned out to be right [1], without a host read."""
    flags = [wrong.to(device) for block in blocks for wrong in block.pending.doubts.values()]
    return torch.stack(flags).sum(0, keepdim=True) if flags else torch.zeros(1, dtype=torch.int64, device=device)


def _condense(blocks: list[Curvature], ranks: Ranks) -> None:
    """Of rows that are many in all, what they add up to."""
    held = [(block, rows) for block in blocks if (rows := block.approx.rows_held(block.pending.tensors)) is not None]
    if not held:
        return
    told = torch.tensor([rows for _, rows in held], device=held[0][0].params[0].device)
    ranks.sum_([told])
    for (block, _), rows in zip(held, told.tolist(), strict=True):
        block.pending.tensors = block.approx.condensed(block.pending.tensors, rows)


def _collect(blocks: list[Curvature], ranks: Ranks) -> None:
    """Sums of what adds up, and after them the rows of all processes in their order."""
    slots = [(block, key) for block in blocks for key in slots_of(block)]
    gathering = [block for block in blocks if block.approx.gathered]
    rows = PackedRows(gathering) if gathering else None
    header = [int(key in block.pending.tensors) for block, key in slots]
    sizes = [] if rows is None else ranks.at_own_place(rows.sizes)
    told = torch.tensor(header + sizes, device=blocks[0].params[0].device)
    ranks.sum_([told])
    there = told.tolist()
    _sum([slot for slot, n in zip(slots, there, strict=False) if n], ranks)
    if rows is not None:
        rows.gather(ranks, there[len(slots) :])


def _sum(slots: list[tuple[Curvature, str]], ranks: Ranks) -> None:
    """Sums of what some process has measured."""
    sent: list[Tensor] = []
    for block in {id(block): block for block, _ in slots}.values():
        own, device = block.pending, block.params[0].device
        keys = [key for other, key in slots if other is block]
        zero = {key: torch.zeros_like(slots_of(block)[key], device=device) for key in keys if key not in own.tensors}
        summed = {key: zero[key] if key in zero else own.tensors[key].contiguous() for key in keys}
        own.tensors = {**own.tensors, **summed}
        own.total = next(iter(summed.values())).new_zeros(()) if own.total is None else own.total
        sent += [*summed.values(), own.total]
    ranks.sum_(sent)


class PackedRows:
    """The rows of blocks, as bytes.

    known: what all processes have and is not sent.
    """

    def __init__(self, blocks: list[Curvature]) -> None:
        self.blocks = blocks
        layers = [layer for block in blocks for layer in block.layers]
        sites = [site for layer in layers for site in layer.sites]
        self.known = [*layers, *sites, *(site.module for site in sites)]
        self.devices = list(dict.fromkeys([*(block.params[0].device for block in blocks), torch.device("cpu")]))
        rows = [_gathered_part(block) for block in blocks]
        self.own, self.head = packed(rows, self.known, self.devices) if any(rows) else (self._nothing, 0)
        self.sizes = [len(self.own), self.head]
        for block, own in zip(blocks, rows, strict=True):
            block.pending.tensors = {key: x for key, x in block.pending.tensors.items() if key not in own}

    @property
    def _nothing(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8, device=self.devices[0])

    def gather(self, ranks: Ranks, sizes: list[int]) -> None:
        """Give each block the rows of all processes; sizes: those of each, in turn.

        All read what was sent, also that of their own, whose memory may lie otherwise: so their sums round alike.
        """
        every = ranks.gathered(self.own, sizes[::2])
        for data, head in zip(every, sizes[1::2], strict=True):
            if head:
                for block, rows in zip(self.blocks, unpacked(data, head, self.known, self.devices), strict=True):
                    if rows:
                        block.pending.tensors = block.approx.collected(block.pending.tensors, rows)


def _gathered_part(block: Curvature) -> Tensors:
    held = block.pending.tensors
    return {key: held[key] for key in block.approx.gathered if key in held}
