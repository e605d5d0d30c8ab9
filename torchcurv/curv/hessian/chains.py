"""Chains: operations that are taken as one function, between the tensors where a fork or a sum makes that matter.

Op by op, a propagation is exact as long as what it drops is zero. That ends

    * where two branches of one tensor meet again (x - mean(x), x * sigmoid(x)): their cross terms are dropped;
    * in the diagonal form, where a map that mixes elements follows another one (a mean of a mean, upsampling and
      pooling): H between them is not diagonal.

From the operation at the top of such a place, its head, a chain goes down to the tensors at which the fork lies, or
below which H is read element by element. It ends at the outputs of layers and at operations that no chain contains.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple

import torch
from torch import Tensor

from torchcurv.curv.graph import Edge
from torchcurv.curv.hessian.local import Local, Propagation
from torchcurv.curv.hessian.operation import Key, Op, key_of

Step = tuple[Op, list[int]]
REPEATS = {  # moves that may read an element more than once
    *("expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile", "unfold", "pad", "getitem"),
    *("index_select", "gather", "take_along_dim", "max_pool", "adaptive_max_pool"),
}


@dataclass(frozen=True)
class Chain:
    """steps: in the order of the forward pass, the head last. starts: the edges that its branches come from."""

    steps: tuple[Step, ...]
    starts: tuple[Edge, ...]

    @property
    def curved(self) -> bool:
        """Whether it has a second derivative."""
        return any(is_curved(op, slots) for op, slots in self.steps)


def is_curved(op: Op, slots: list[int]) -> bool:
    return op.rule.curved or (op.rule.operands and len(slots) > 1)


def chains(steps: list[Step], targets: Collection[Key], now: Propagation) -> dict[Op, Chain]:
    """The chains of a propagation, by their heads. steps: from the output backwards."""
    places = _Places(steps)
    found = {}
    for index, (op, slots) in enumerate(steps):
        joins = len(slots) > 1 and ((op.rule.chain == "entry" and not op.rule.move) or not now.diag)
        if _contains(op, slots, now) and (joins or (now.diag and op.rule.chain == "mixing")):
            chain = _Descent(steps, places, targets, now).chain(index)
            if chain is not None:
                found[op] = chain
    return found


def _contains(op: Op, slots: list[int], now: Propagation) -> bool:
    """Whether a chain may contain an operation."""
    if not now.diag:
        return op.rule.chain != ""
    return op.rule.chain == "entry" or (op.rule.chain == "mixing" and len(slots) == 1)


class _Use(NamedTuple):
    op: Op
    slot: int


class _Places:
    """making: the step that makes a tensor. lowest: the last one, counted from the output, that uses it."""

    def __init__(self, steps: list[Step]) -> None:
        self.making = {key_of(op.output): index for index, (op, _) in enumerate(steps)}
        self.lowest = {key_of(op.inputs[slot]): index for index, (op, slots) in enumerate(steps) for slot in slots}


class _Descent:
    """The operations below one head that a chain may contain, and the tensors at which going op by op is not exact."""

    def __init__(self, steps: list[Step], places: _Places, targets: Collection[Key], now: Propagation) -> None:
        self.steps, self.places, self.targets, self.now = steps, places, targets, now
        self.uses: dict[Key, list[_Use]] = {}
        self.mixed: set[Key] = set()  # where H is not diagonal, though it is at the head
        self.trouble: set[Key] = set()

    def chain(self, head: int) -> Chain | None:
        todo, inside, seen = [head], [], {head}
        while todo:  # from the top: all uses of a tensor come before what made it
            index = heappop(todo)
            op, slots = self.steps[index]
            self._meet(key_of(op.output))
            if not todo and index != head and self._is_neck(index):
                break
            inside.append(index)
            for slot in slots:
                key = key_of(op.inputs[slot])
                self._pass(op, slot, key)
                below = self.places.making.get(key)
                if below is None or below in seen or key in self.targets or not _contains(*self.steps[below], self.now):
                    continue
                seen.add(below)
                heappush(todo, below)
        for key in self.uses:
            self._meet(key)
        return self._down_to_trouble(inside) if self.trouble else None

    def _is_neck(self, index: int) -> bool:
        """Whether all that lies below is reached through the output of one operation, at which H is what is kept."""
        key = key_of(self.steps[index][0].output)
        kept = key not in self.mixed if self.now.diag else not self.trouble
        return kept and all(self.places.lowest[other] < index for other in self.uses if other != key)

    def _pass(self, op: Op, slot: int, key: Key) -> None:
        self.uses.setdefault(key, []).append(_Use(op, slot))
        mixed, mixing = key_of(op.output) in self.mixed, op.rule.chain == "mixing"
        if self.now.diag and mixed and (mixing or _repeats(op, slot)):
            self.trouble.add(key)
        if mixed or mixing:
            self.mixed.add(key)

    def _meet(self, key: Key) -> None:
        """Branches that come from one tensor, unless they read different elements of it."""
        uses = self.uses.get(key, ())
        if len(uses) > 1 and not (self.now.diag and _are_apart(uses)):
            self.trouble.add(key)
            self.mixed.add(key)

    def _down_to_trouble(self, inside: list[int]) -> Chain:
        kept: list[Step] = []
        made: set[Key] = set()
        starts: dict[Key, Edge] = {}
        for index in sorted(inside, reverse=True):
            op, slots = self.steps[index]
            edges = [op.inputs[slot] for slot in slots]
            if any(key_of(edge) in self.trouble or key_of(edge) in made for edge in edges):
                kept.append((op, slots))
                made.add(key_of(op.output))
                starts.update({key_of(edge): edge for edge in edges if key_of(edge) not in made})
        return Chain(tuple(kept), tuple(starts.values()))


def _repeats(op: Op, slot: int) -> bool:
    """Whether an operation may read an element of an argument more than once."""
    plain = op.name.split("d_with")[0].rstrip("123d")
    return op.name in REPEATS or plain in REPEATS or op.shape.numel() > op.inputs[slot].shape.numel()


def _are_apart(uses: Sequence[_Use]) -> bool:
    """Whether all uses are moves, and no element is read by two of them."""
    if not all(use.op.rule.move for use in uses):
        return False
    reads = [_reads(use).flatten() for use in uses]
    return bool((torch.stack(reads).sum(0) <= 1).all())


def _reads(use: _Use) -> Tensor:
    local = Local(use.op, use.slot, torch.float32)
    return (local.pull(torch.ones_like(local.out)) != 0).to(torch.uint8)
