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
    objecting = [block for block in blocks if block.pending.objection is not None]
    header = [int(key in block.pending.tensors) for block, key in slots] + [len(objecting), len(unsent)]
    told = torch.tensor(header, device=device)
    ranks.sum_([told])
    *there, objections, unsendable = told.tolist()
    if objections and not objecting:
        raise RuntimeError("another process refuses what it measured, and its message says why: no process steps")
    if unsendable:
        names = ", ".join(repr(block.name) for block in unsent[:3]) or "of another process"
        raise NotImplementedError(
            f"the curvature of block {names} is kept as rows, which are not sent between processes yet: choose "
            'approx="kfac", "ekfac", "diag", "unit" or "block", raise rows_limit, or pass process_group=None'
        )
    if objections:
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
