"""Base."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from torchcurv.curv.approximations.factors import Factor
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.linalg.symmetric import Damping
from torchcurv.curv.statistics.block import Stats

Tensors = dict[str, Tensor]
Basis = tuple[Tensor, Tensor]
WHOLE = ("",)


class Approximation(Protocol):
    @property
    def linear(self) -> tuple[str, ...]: ...

    parts: ClassVar[tuple[str, ...]]

    def measure(self, stats: Stats, basis: Basis | None = None, wanted: Collection[str] = ...) -> Tensors: ...

    def of_rows(self, start: int, rows: Tensor, shapes: list[tuple[int, int, int]]) -> Tensors: ...

    def product(self, tensors: Tensors, x: Tensor) -> Tensor: ...

    def trace(self, tensors: Tensors) -> Tensor: ...

    def empty(self, layers: list[Layer], like: Tensor) -> Tensors: ...

    def factor(
        self, tensors: Tensors, damping: Damping, damping_type: str, basis: Basis | None = None
    ) -> tuple[Factor, Tensor]: ...


def part_of(key: str, parts: tuple[str, ...]) -> str:
    """Which part a statistic belongs to: the count of the rows to A, moments in the basis of B ⊗ A to B."""
    if parts == WHOLE:
        return ""
    return "A" if key.startswith(("A", "count")) else "B"


def damping_tensor(damping: Damping, like: Tensor) -> Tensor:
    return torch.as_tensor(damping, dtype=like.dtype, device=like.device)
