"""What is measured is reduced over processes, just before it is used."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from torchcurv.curv.approximations.base import Tensors
from torchcurv.curv.block.block import Curvature
from torchcurv.curv.distributed import Ranks
from torchcurv.curv.linalg.triangles import from_triangle, to_triangle
from torchcurv.curv.statistics.packing import packed, unpacked
from torchcurv.optim.engine.agreement import alike, description, difference, digest
from torchcurv.optim.engine.damping import Group

_slots: WeakKeyDictionary[Curvature, tuple[torch.dtype, dict[str, Tensor]]] = WeakKeyDictionary()


def slots_of(block: Curvature) -> dict[str, Tensor]:
    """What a measurement of a block can hold, on the meta device: a process without data knows what to send."""
    wanted = torch.promote_types(block.params[0].dtype, torch.float32)
    dtype, slots = _slots.get(block, (None, {}))
    if dtype != wanted:  # the model may have moved
        like = torch.zeros((), dtype=wanted, device="meta")
        marks = dict.fromkeys(block.approx.forms.marks, like)
        slots = {**block.approx.empty(block.layers, like), **marks}
        _slots[block] = wanted, slots
    return slots


class Measuring(Protocol):
    """What is asked of an engine."""

    step: int
    groups: Sequence[Group]
    ranks: Ranks
    rows_stay: bool

    @property
    def blocks(self) -> list[Curvature]: ...


def reduce_pending(engine: Measuring, due: list[Curvature]) -> None:
    """Make what is pending of the blocks that are due that of all processes.

    Statistics that scale with the loss become the mean, others the sum, as those of micro-batches whose losses are
    divided by their number. A process that measured nothing of a block has zeros, and no rows.
    """
    ranks = engine.ranks
    if ranks.searching and not any(block.pending for block in engine.blocks):
        return  # the step of zeros by which a checkpoint library makes the state, before the model has run
    if not (due or (engine.blocks and not ranks.agreed)) or ranks.count == 1:
        return
    moving = [block for block in due if not (engine.rows_stay and block.approx.of_one_step)]
    present = [_present(block) for block in moving]
    said = description(engine.step, engine.groups, engine.blocks, due)
    said["factor_placement="] = repr(ranks.placement)
    same = _exchange(due, ranks, engine.blocks[0].params[0].device, said, present)
    if moving:
        _condense(moving, ranks)
        _collect(moving, ranks, same)


def _exchange(
    blocks: list[Curvature], ranks: Ranks, device: torch.device, said: dict[str, str], present: list[list[int]]
) -> bool:
    """Whether all processes measured the same; an error in all of them where one objects to what it measured, or they
    do not train alike.

    One small message, whatever was measured: it arrives also where processes have nothing else in common.
    """
    for block in blocks:
        pending = block.pending
        pending.objection = pending.objection or pending.edited(block.name) or _unknown(block)
    objecting = sum(block.pending.objection is not None for block in blocks)
    digests = [*digest(said), *digest(present)]
    own = torch.tensor([*digests, *(x * x for x in digests), objecting], device=device)
    told = torch.cat([own, _doubts(blocks, device)])
    ranks.sum_([told])
    *sums, objections, doubts = told.tolist()
    sums, squares = sums[:4], sums[4:]
    if not alike(sums[:2], squares[:2], ranks.count):
        raise RuntimeError(difference([json.loads(text) for text in ranks.texts(json.dumps(said), device)]))
    ranks.agreed = True
    if objections + doubts:
        _object(blocks, ranks, device)
    for block in blocks:
        block.pending.doubts = {}
    return alike(sums[2:], squares[2:], ranks.count)


def _unknown(block: Curvature) -> str | None:
    """What is wrong where an approximation does not say how to put together what it measured."""
    keys = block.pending.tensors.keys() - slots_of(block).keys() - set(block.approx.gathered)
    if not keys:
        return None
    return (
        f"block {block.name!r} measured {', '.join(map(repr, sorted(keys)))}, and its approximation "
        f"{type(block.approx).__name__} does not say what several processes make of it: return zeros for it in `empty` "
        "where it is summed, name it in `gathered` where it is collected, or pass process_group=None"
    )


def _object(blocks: list[Curvature], ranks: Ranks, device: torch.device) -> None:
    """Raise what this process objects to, or what others do."""
    for block in blocks:
        block.pending.settle_doubts()
    own = next((why for block in blocks if (why := block.pending.objection) is not None), "")
    others = filter(None, ranks.texts(own, device))
    raise RuntimeError(own or f"another process refuses what it measured, so that none steps: {next(others)}")


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


def _collect(blocks: list[Curvature], ranks: Ranks, same: bool) -> None:
    """Sums of what adds up, and after them the rows of all processes in their order.

    same: whether all processes measured the same slots in the same forms.
    """
    present, gathering = [_present(block) for block in blocks], [block for block in blocks if block.approx.gathered]
    if same and not gathering:
        _sum(blocks, present, ranks)
        return
    rows = PackedRows(gathering, 1 / ranks.count) if gathering else None
    sizes = [] if rows is None else ranks.at_own_place(rows.sizes)
    told = torch.tensor([*itertools.chain(*present), *sizes], device=blocks[0].params[0].device)
    ranks.sum_([told])
    found = iter(told.tolist())
    _sum(blocks, [[next(found) for _ in own] for own in present], ranks)
    if rows is not None:
        rows.gather(ranks, list(found))


def _present(block: Curvature) -> list[int]:
    """Which slots were measured, and in which forms."""
    own = block.pending.tensors
    return [*(int(key in own) for key in slots_of(block)), *map(int, block.approx.forms.of(own))]


def _sum(blocks: list[Curvature], there: list[list[int]], ranks: Ranks) -> None:
    """Sums of what some process has measured, of symmetric matrices as triangles.

    there: for each block, how many have what `_present` says.
    """
    sent: list[Tensor] = []
    triangles: list[tuple[Tensors, str, int]] = []
    for block, counts in zip(blocks, there, strict=True):
        own, device, slots = block.pending, block.params[0].device, slots_of(block)
        forms = [n > 0 for n in counts[len(slots) :]]
        own.tensors, zeros = (block.approx.forms.unified(x, forms) for x in (own.tensors, slots))
        own.scale(1 / ranks.count)
        summed = {
            key: own.tensors[key].contiguous() if key in own.tensors else torch.zeros_like(zeros[key], device=device)
            for key, n in zip(slots, counts, strict=False)
            if n and key in zeros
        }
        if not summed:
            continue
        own.total = next(iter(summed.values())).new_zeros(()) if own.total is None else own.total
        halves = {key: to_triangle(x) for key, x in summed.items() if key in block.approx.symmetric}
        own.tensors = {**own.tensors, **summed, **halves}
        sent += [*(summed | halves).values(), own.total]
        triangles += [(own.tensors, key, summed[key].shape[-1]) for key in halves]
    ranks.sum_(sent)
    for tensors, key, d in triangles:
        tensors[key] = from_triangle(tensors[key], d)


class PackedRows:
    """The rows of blocks, as bytes.

    factor: of the loss. known: what all processes have and is not sent.
    """

    def __init__(self, blocks: list[Curvature], factor: float) -> None:
        self.blocks = blocks
        layers = [layer for block in blocks for layer in block.layers]
        sites = [site for layer in layers for site in layer.sites]
        self.known = [*layers, *sites, *(site.module for site in sites)]
        self.devices = list(dict.fromkeys([*(block.params[0].device for block in blocks), torch.device("cpu")]))
        rows = [block.approx.scaled(_gathered_part(block), factor) for block in blocks]
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
        if not any(sizes):
            return
        every = ranks.gathered(self.own, sizes[::2])
        for data, head in zip(every, sizes[1::2], strict=True):
            if head:
                for block, rows in zip(self.blocks, unpacked(data, head, self.known, self.devices), strict=True):
                    if rows:
                        block.pending.tensors = block.approx.collected(block.pending.tensors, rows)


def _gathered_part(block: Curvature) -> Tensors:
    held = block.pending.tensors
    return {key: held[key] for key in block.approx.gathered if key in held}
