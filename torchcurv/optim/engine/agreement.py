"""What processes must have in common, so that their steps are the same and they wait for the same messages."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.numerics import on_cpu
from torchcurv.optim.engine.damping import Group

BITS = 24  # of a digest, whose square is summed over processes
SHOWN = 3  # differences that a message names

_described: WeakKeyDictionary[Curvature, str] = WeakKeyDictionary()


def description(
    step: int, groups: Sequence[Group], blocks: Sequence[Curvature], due: Sequence[Curvature]
) -> dict[str, str]:
    """What this process has, by what it is; of options, those that are read without a wait."""
    own, measured = {"the number of steps taken": str(step)}, set(due)
    for k, group in enumerate(groups):
        own |= {f"{key}= of group {k}": shown for key, value in group.items() if (shown := _shown(value))}
    return own | {f"block {b.name!r}": f"{_block(b)}, {'due' if b in measured else 'not due'}" for b in blocks}


def _shown(value: Any) -> str:
    """Empty for what cannot be compared, such as functions of the step."""
    if isinstance(value, Tensor):
        return repr(value.item()) if not value.dim() and on_cpu(value) else ""
    return repr(value) if isinstance(value, int | float | str | tuple | None) else ""


def _block(block: Curvature) -> str:
    if block not in _described:
        shapes = ", ".join(str(tuple(p.shape)) for p in block.params)
        _described[block] = f"{block.kind}, {type(block.approx).__name__}, {shapes}"
    return _described[block]


def digest(own: object) -> tuple[int, int]:
    """Two numbers that stand for something whose repr is the same where it is."""
    found = hashlib.blake2b(repr(own).encode(), digest_size=BITS // 4).digest()
    return int.from_bytes(found[: BITS // 8], "big"), int.from_bytes(found[BITS // 8 :], "big")


def alike(sums: Sequence[int], squares: Sequence[int], count: int) -> bool:
    """Whether numbers are the same in so many processes; known are their sums and those of their squares."""
    return all(count * square == total * total for total, square in zip(sums, squares, strict=True))


def difference(every: Sequence[Mapping[str, str]]) -> str:
    """The sentence about what processes have; every: what each says it has."""
    names = dict.fromkeys(name for own in every for name in own)
    unlike = [(name, [own.get(name, "missing") for own in every]) for name in names]
    said = [
        f"{name} is {has[0]} in process 0 and {has[other]} in process {other}"
        for name, has in unlike
        if (other := next((k for k, one in enumerate(has) if one != has[0]), 0))
    ]
    more = f", and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    return (
        f"the processes do not train alike: {'; '.join(said[:SHOWN])}{more}. Build the same model and optimizer in "
        "every process, change options in all of them, and load a checkpoint in all of them"
    )
