"""Base."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from typing import ClassVar

import torch
from torch import Tensor

from torchcurv.curv.approximations.factor import Factor
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.linalg.symmetric import Damping
from torchcurv.curv.statistics.block import Stats
from torchcurv.curv.statistics.inputs import Inputs
from torchcurv.curv.statistics.layer import LayerData

Tensors = dict[str, Tensor]
Basis = tuple[Tensor, Tensor]
WHOLE = ("",)


class HessianForms:
    """How an approximation is made of a Hessian, which is no function of (a, s); refused where it does not say."""

    def from_hessian_rows(self, start: int, rows: Tensor, shapes: list[tuple[int, int, int]]) -> Tensors:
        """The statistics of some rows [k, P] of a symmetric matrix, from row `start` on."""
        raise self._refused(
            'is not known of the Hessian: choose "full", "block", "unit" or "diag", or another curv_type'
        )

    def of_diagonal(self, use: LayerData) -> Tensors:
        """The statistics of a Hessian that is known by its diagonal at the outputs of the layer, `use.s`."""
        raise self._refused('has no Hessian that is propagated: choose "diag" or "kfac", or hessian_method="exact"')

    def of_mean_matrix(self, inputs: Inputs, matrix: Callable[[str], Tensor], n: int) -> Tensors:
        """The same for a mean over n samples of its matrices there; matrix: [g, o, o] by how positions are shared."""
        raise self._refused('has no Hessian that is propagated: choose "diag" or "kfac", or hessian_method="exact"')

    def _refused(self, why: str) -> NotImplementedError:
        return NotImplementedError(f"the approximation {type(self).__name__} {why}")


class Approximation(HessianForms, ABC):
    """What is kept of a block, and how it is factored; without a state of its own.

    An entry says five things: `measure`, `empty`, `factor`, `product` and `trace`. The rest has an answer that is right
    for statistics which add up, or a refusal.
    """

    @property
    def linear(self) -> tuple[str, ...]:
        """The statistics that scale with the loss."""
        raise self._refused("does not say which of its statistics scale with the loss: define `linear`")

    parts: ClassVar[tuple[str, ...]] = WHOLE  # those that are measured on their own where intervals are adaptive
    keeps_rows: ClassVar[bool] = False  # whether what was measured is kept as rows until the step
    subsampled: ClassVar[bool] = False  # whether every k-th sample may stand for all
    propagated: ClassVar[str | None] = None  # in which form a Hessian that is carried back is kept: "diag", "matrix"

    @abstractmethod
    def measure(self, stats: Stats, basis: Basis | None = None, due: Collection[str] = WHOLE) -> Tensors:
        """The statistics of some signals, additive over signals, micro-batches and ranks."""

    @abstractmethod
    def product(self, tensors: Tensors, x: Tensor) -> Tensor:
        """C x for x [g, o, d]."""

    @abstractmethod
    def trace(self, tensors: Tensors) -> Tensor:
        """tr C, a 0-d tensor."""

    @abstractmethod
    def empty(self, layers: list[Layer], like: Tensor) -> Tensors:
        """The statistics of no signals: zeros of the right shapes, like `like`."""

    @abstractmethod
    def factor(
        self, tensors: Tensors, damping: Damping, damping_type: str, basis: Basis | None = None
    ) -> tuple[Factor, Tensor]:
        """(the factor, whether it could be computed: a 0-d bool tensor)."""

    # ------------------------------------------------------------------- right for what adds up, or refused

    @property
    def of_one_step(self) -> bool:
        """Whether it holds what one step measured: no average, nothing to save."""
        return False

    @property
    def needs_all_signals(self) -> bool:
        """Whether no part can be measured without signals."""
        return False

    def describe(self, size: int, shape: tuple[int, int, int]) -> str:
        """The sizes of what is kept, as a summary prints them; shape: (g, o, i) of the first layer."""
        return f"{size}"

    def normalised_measurement(self, tensors: Tensors) -> Tensors:
        """What was measured for one step, with as much weight in an average as that of any other."""
        return tensors

    def follow(self, tensors: Tensors, factor: Factor, damping_type: str) -> Factor:
        """The factor with what it can take over from new averages without a factorisation."""
        return factor

    def rebased(self, tensors: Tensors, factor: Factor) -> Tensors:
        """The averages in the basis of a new factor."""
        return tensors

    def restored(self, factor: Factor) -> Factor:
        """A factor that was read from a state."""
        return factor

    def sides_of(self, tensors: Tensors) -> tuple[Tensor | None, Tensor]:
        """C as a Kronecker product (left or None, right)."""
        raise self._refused("is no Kronecker product")


def part_of(key: str, parts: tuple[str, ...]) -> str:
    """Which part a statistic belongs to: the count of the rows to A, moments in the basis of B ⊗ A to B."""
    if parts == WHOLE:
        return ""
    return "A" if key.startswith(("A", "count")) else "B"


def damping_tensor(damping: Damping, like: Tensor) -> Tensor:
    return torch.as_tensor(damping, dtype=like.dtype, device=like.device)
