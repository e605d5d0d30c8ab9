"""What is measured is reduced over processes, just before it is used."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.distributed import Ranks

_slots: WeakKeyDictionary[Curvature, dict[str, Tensor]] = WeakKeyDictionary()


def slots_of(block: Curvature) -> dict[str, Tensor]:
    """What a measurement of a block can hold, on the meta device: a process without data knows what to send."""
    if block not in _slots:
        p = block.params[0]
        like = torch.zeros((), dtype=torch.promote_types(p.dtype, torch.float32), device="meta")
        _slots[block] = block.approx.empty(block.layers, like)
    return _slots[block]


def _doubts(blocks: list[Curvature], device: torch.device) -> Tensor:
    """How many doubts turned out to be right [1], without a host read."""
    flags = [wrong.to(device) for block in blocks for wrong in block.pending.doubts.values()]
    return torch.stack(flags).sum(0, keepdim=True) if flags else torch.zeros(1, dtype=torch.int64, device=device)


def _check_objections(blocks: list[Curvature], objections: int, doubts: int) -> None:
    """Raise where another process objects to what it measured, and this one does not; how many do is known."""
    for block in blocks:
        block.pending.settle_doubts(any_right=doubts > 0)
    if objections + doubts and all(block.pending.objection is None for block in blocks):
        raise RuntimeError("another process refuses what it measured, and its message says why: no process steps")


def reduce_pending(blocks: list[Curvature], ranks: Ranks) -> None:
    """Make what is pending of the blocks that are due that of all processes.

    blocks: the same on every process. Statistics that scale with the loss become the mean, others the sum, as those of
    micro-batches whose losses are divided by their number. A process that measured nothing of a block has zeros.
    """
    if not blocks or (count := ranks.count) == 1:
        return
    device = blocks[0].params[0].device
    slots = [(block, key) for block in blocks for key in slots_of(block)]
    unsent = [b for b in blocks if not b.pending.tensors.keys() <= slots_of(b).keys()]
    objecting = sum(block.pending.objection is not None for block in blocks)
    header = [int(key in block.pending.tensors) for block, key in slots] + [objecting, len(unsent)]
    told = torch.cat([torch.tensor(header, device=device), _doubts(blocks, device)])
    ranks.sum_([told])
    *there, objections, unsendable, doubts = told.tolist()
    _check_objections(blocks, objections, doubts)
    if unsendable:
        names = ", ".join(repr(block.name) for block in unsent[:3]) or "of another process"
        raise NotImplementedError(
            f"the curvature of block {names} is kept as rows, which are not sent between processes yet: choose "
            'approx="kfac", "ekfac", "diag", "unit" or "block", raise rows_limit, or pass process_group=None'
        )
    if objections + doubts:
        return
    sent: list[Tensor] = []
    for block in {id(block): block for (block, _), n in zip(slots, there, strict=True) if n}.values():
        own = block.pending
        own.scale(1 / count)
        keys = [key for (other, key), n in zip(slots, there, strict=True) if other is block and n]
        zero = {key: torch.zeros_like(slots_of(block)[key], device=device) for key in keys if key not in own.tensors}
        own.tensors = {key: zero[key] if key in zero else own.tensors[key].contiguous() for key in keys}
        own.total = next(iter(own.tensors.values())).new_zeros(()) if own.total is None else own.total
        sent += [*own.tensors.values(), own.total]
    ranks.sum_(sent)
