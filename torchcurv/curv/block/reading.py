"""What is read of a block, beside steps: draws, diagonals, sizes, effective dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from torchcurv.curv.approximations.factor import Factor
from torchcurv.curv.block.block import Curvature


def measured_factor(block: Curvature) -> Factor:
    """The factor of a block that has one."""
    if block.factor is None:
        raise RuntimeError(f"the curvature of block {block.name!r} has not been measured yet")
    return block.factor


def draw_from(block: Curvature, damping: float | Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
    """One draw from N(0, (C + damping I)^-1), shaped like the pieces of the block."""
    factor, layout, p = measured_factor(block), block.layout, block.params[0]
    dtype = torch.promote_types(p.dtype, torch.float32)
    noise = [torch.randn(x.shape, dtype=dtype, device=p.device, generator=generator) for x in block.layers]
    if factor.layer_by_layer:
        return layout.split(factor.sample(noise, damping))
    return layout.split(layout.unflatten(factor.sample(layout.flatten(noise), damping)))


def diagonal_of(block: Curvature) -> list[Tensor]:
    """The diagonal of C, one [g, o, i] per layer."""
    factor = measured_factor(block)
    diagonal = factor.diag()
    if factor.layer_by_layer:
        return diagonal
    if len(block.layers) > 1:
        return block.layout.unflatten(diagonal)
    return [diagonal.reshape(block.layers[0].shape)]


def effective_dimension_of(block: Curvature, damping: float | Tensor) -> Tensor:
    """tr C (C + damping I)^-1, a 0-d tensor: in how many directions the curvature outweighs the damping."""
    return measured_factor(block).effective_dimension(damping, lambda: block.approx.sides_of(block.tensors))


def sizes_of(block: Curvature) -> str:
    """Sizes of the matrices kept, as the summary prints them."""
    return block.approx.describe(block.size, block.layers[0].shape)


def memory_of(block: Curvature) -> int:
    """Bytes held by the running average and the factors."""
    held = [value for value in block.tensors.values() if isinstance(value, Tensor)]
    for slot in block.factors.values():
        held += () if slot.factor is None else slot.factor.state().values()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}
    return sum(storages.values())
