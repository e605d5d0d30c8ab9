"""What a step takes where a block's curvature gives no direction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.kinds.table import kind_of
from torchcurv.curv.numerics import at_least_float32, on_cpu, sum_of
from torchcurv.optim.engine.damping import Group


def finite_or_zero(gradient: Tensor) -> Tensor:
    """A gradient, or zero where it has an entry that is not finite: what has no curvature does not move then."""
    finite = torch.isfinite(gradient.sum())
    if on_cpu(finite):
        return gradient if finite else torch.zeros_like(gradient)
    return torch.where(finite, gradient, 0)


def has_moved(block: Curvature) -> bool:
    """Whether some parameter of a block, or its part of one, has a gradient that is not zero."""
    return any(piece.of(piece.param.grad).any() for piece in block.pieces if piece.param.grad is not None)


class Followers:
    """Blocks that have no curvature yet and follow their gradients in this step, of length 1 at the most.

    names: of these blocks. alone: parameters that are not used as the types of their modules say, of which blocks of
    single elements are made when `rebuild` is seen.
    """

    def __init__(self, alone: set[Tensor]) -> None:
        self.names: set[str] = set()
        self.alone, self.rebuild = alone, False

    def add(self, blocks: list[Curvature], alone: Mapping[str, Iterable[Tensor]] = MappingProxyType({})) -> None:
        """alone: by the name of a block, the parameters that are taken element by element from the next step on."""
        self.names |= {block.name for block in blocks}
        for params in alone.values():
            self.alone.update(params)
            self.rebuild = True


def short(gradients: list[Tensor]) -> list[Tensor]:
    """The gradients of a block, of length 1 at the most."""
    plain = [at_least_float32(finite_or_zero(g)) for g in gradients]
    scale = torch.stack([g.norm() for g in plain]).norm().clamp_min(1)
    return [g / scale for g in plain]


def all_usable(blocks: list[Curvature], found: list[list[Tensor]]) -> bool:
    """Whether `usable_direction` would take each direction as it is, where that can be read; it rarely would not."""
    tensors = [x for own in found for x in own]
    if not all(map(on_cpu, tensors)):
        return False
    flags = [flag for block in blocks for flag in _flags(block)]
    finite = not tensors or bool(torch.isfinite(torch.stack(torch._foreach_norm(tensors)).sum()))
    return finite and (not flags or bool(torch.stack(flags).all()))


def _flags(block: Curvature) -> list[Tensor]:
    """Whether what a direction is made of is known, as 0-d tensors."""
    if not kind_of(block.kind, block.options).of_the_loss:  # λ (0 + λ I)^-1 g is the gradient
        return []
    factor = block.factor
    return [x for x in (block.average.known, None if factor is None else factor.finite) if x is not None]


def usable_direction(block: Curvature, gradients: list[Tensor], found: list[Tensor]) -> list[Tensor]:
    """The direction of a block, if it is finite and something was measured; else its gradient, of length 1 at the
    most, or nothing where that is not finite.

    (C + λ I)^-1 g with an unknown C would be g / λ, a step of any length. Length 1 is a choice, not a measurement: lr
    and the KL clip shorten it further. A direction that is not finite although the gradient is counts as a failed
    factorisation.
    """
    finite = torch.isfinite(sum_of(found))
    usable = finite
    for known in _flags(block):
        usable = usable & known
    if on_cpu(usable) and usable:
        return found
    plain = [at_least_float32(g) for g in gradients]
    length = torch.stack([g.norm() for g in plain]).norm()
    there = torch.isfinite(length)
    block.health.note_failed(~finite & there)
    scale = length.clamp_min(1)
    return [
        torch.where(usable, x, torch.where(there, g / scale, 0).to(x.dtype)) for x, g in zip(found, plain, strict=True)
    ]


def put(block: Curvature, taken: list[Tensor], gradients: dict[Tensor, Tensor], solved: dict[Tensor, Tensor]) -> None:
    """Put what a block takes in the place of its gradients, into `solved`."""
    for piece, x in zip(block.pieces, taken, strict=True):
        p = piece.param
        if p in gradients and piece.rows is None:
            solved[p] = x
        elif p in gradients:
            piece.of(solved.setdefault(p, gradients[p].to(x.dtype, copy=True))).copy_(x)


def descend_uncovered(groups: Sequence[Group], blocks: Sequence[Curvature]) -> None:
    """Parameters without a curvature follow the gradient."""
    covered = {p for block in blocks for p in block.params}
    for group in groups:
        for p in group["params"]:
            if p.grad is not None and p not in covered:
                p.add_(finite_or_zero(p.grad), alpha=-group["lr"])
