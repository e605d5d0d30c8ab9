"""The curvature of a loss, block by block, as one symmetric matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.analysis.spectra import Spectra, Vector
from torchcurv.curv.block.block import Curvature
from torchcurv.curv.block.layout import gathered
from torchcurv.curv.block.reading import diagonal_of, draw_from, measured_factor


class CurvatureSet(Spectra):
    """The curvature C of a loss, block-diagonal over `blocks`, and its algebra.

    blocks: name -> Curvature; the block of approx="full" is "full".
    params: the covered parameters in the model's order; P is their number of elements.

    Vectors are those of `OverParameters`.
    """

    def __init__(self, blocks: list[Curvature], params: dict[str, Tensor]) -> None:
        self.blocks = {block.name: block for block in blocks}
        self._named = params

    def _apply(self, v: Vector, f: Callable[[Curvature, list[Tensor]], list[Tensor]]) -> Any:
        columns, restore = self._columns(v)
        return restore(
            self._gathered(lambda block: f(block, [piece.of(columns[piece.param]) for piece in block.pieces]))
        )

    def _gathered(self, f: Callable[[Curvature], list[Tensor]]) -> dict[Tensor, Tensor]:
        """Per parameter, what f says of its pieces in each block."""
        return gathered((block, f(block)) for block in self.blocks.values())

    def _flat(self, f: Callable[[Curvature], list[Tensor]]) -> Tensor:
        """One tensor per parameter, from every block, flattened in order."""
        out = self._gathered(f)
        return torch.cat([out[p].flatten() for p in self.params])

    # ---------------------------------------------------------------------------------- algebra

    def matvec(self, v: Vector) -> Any:
        """C v."""
        return self._apply(v, lambda block, x: block.matvec(x))

    def solve(self, v: Vector, damping: float | Tensor) -> Any:
        """(C + damping I)^-1 v; damping > 0 unless C is positive definite."""
        return self._apply(v, lambda block, x: block.solve(x, damping))

    def sample(self, damping: float | Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """One draw from N(0, (C + damping I)^-1), a list like `params`."""
        drawn = self._gathered(lambda block: draw_from(block, damping, generator))
        return [drawn[p] for p in self.params]

    def diag(self) -> Tensor:
        """The diagonal of C, [P]."""
        return self._flat(lambda block: block.layout.split(diagonal_of(block)))

    def trace(self) -> Tensor:
        return torch.stack([measured_factor(block).trace() for block in self.blocks.values()]).sum()

    def logdet(self, damping: float | Tensor) -> Tensor:
        """log det(C + damping I)."""
        return torch.stack([measured_factor(block).logdet(damping) for block in self.blocks.values()]).sum()

    def eigvalsh(self) -> Tensor:
        """All P eigenvalues of C, ascending."""
        return torch.cat([measured_factor(block).eigvalsh() for block in self.blocks.values()]).sort().values

    def to_dense(self) -> Tensor:
        """C as a [P, P] matrix."""
        like = diagonal_of(next(iter(self.blocks.values())))[0]
        size = sum(p.numel() for p in self.params)
        return self.matvec(torch.eye(size, dtype=like.dtype, device=like.device))

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.params)
        return f"CurvatureSet({len(self.blocks)} blocks over {size} parameters)"
