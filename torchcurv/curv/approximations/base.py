"""What an approximation must say: which statistics of (a, s) it keeps of a block, and how they become a factor.

Its statistics are tensors by key, {key: tensor}, and a `Statistic` is a group of keys that are measured together. What
an entry must say is what adds up (`measure`), what nothing is (`empty`), the factor, C x and tr C. The rest follows for
statistics that add up over signals, micro-batches and ranks; approximations that keep rows say it themselves, with the
keys that processes collect of one another (`gathered`; by_rows.py, low_rank.py). Those that are symmetric matrices may
be named in `symmetric`: processes then send half of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchcurv.curv.approximations.averaging import Averaged as Averaged
from torchcurv.curv.approximations.averaging import Averaging, Refusing
from torchcurv.curv.approximations.averaging import Forms as Forms
from torchcurv.curv.approximations.averaging import Statistic as Statistic
from torchcurv.curv.approximations.averaging import Tensors as Tensors
from torchcurv.curv.approximations.factoring import Basis as Basis
from torchcurv.curv.approximations.factoring import Factoring
from torchcurv.curv.hessian.products import CurvatureVectorProduct
from torchcurv.curv.linalg.symmetric import Damping
from torchcurv.curv.statistics.block import Stats
from torchcurv.curv.statistics.inputs import Inputs
from torchcurv.curv.statistics.layer import LayerData

WHOLE = ("",)  # the name of the statistic where there is one


class HessianForms(Refusing):
    """How an approximation is made of a Hessian, which is no function of (a, s); refused where it does not say."""

    def from_hessian(
        self, products: CurvatureVectorProduct, layout: Any, generator: torch.Generator | None
    ) -> Iterator[Tensors]:
        """The statistics of the Hessian of one loss, some at a time; layout: that of the block."""
        shapes = [layer.shape for layer in layout.layers]
        for start, rows in products.rows(layout.size, lambda units: layout.of_parameters(units, products.params)):
            yield self.from_hessian_rows(start, layout.coordinates(rows), shapes)

    def from_hessian_rows(self, start: int, rows: Tensor, shapes: list[tuple[int, int, int]]) -> Tensors:
        """The statistics of some rows [k, P] of a symmetric matrix, from row `start` on."""
        raise self._refused(
            'is not known of the Hessian: choose "full", "block", "unit" or "diag", or another curv_type'
        )

    def of_diagonal_estimate(self, diagonal: Tensor) -> Tensors:
        """The statistics of a Hessian that is known by an estimate of its diagonal [g, o, i]."""
        raise self._refused('is not known by the diagonal of a Hessian: choose "diag", or hessian_method="exact"')

    def of_diagonal(self, use: LayerData) -> Tensors:
        """The statistics of a Hessian that is known by its diagonal at the outputs of the layer, `use.s`."""
        raise self._refused('has no Hessian that is propagated: choose "diag" or "kfac", or hessian_method="exact"')

    def of_mean_matrix(self, inputs: Inputs, matrix: Callable[[str], Tensor], n: int) -> Tensors:
        """The same for a mean over n samples of its matrices there; matrix: [g, o, o] by how positions are shared."""
        raise self._refused('has no Hessian that is propagated: choose "diag" or "kfac", or hessian_method="exact"')


class Approximation(Averaging, Factoring, HessianForms, ABC):
    """What is kept of a block, and how it is factored; without a state of its own.

    An entry says six things: `statistics`, `measure`, `empty`, `factor`, `product` and `trace`. The rest has an answer
    that is right for statistics which add up (Averaging, Factoring), or a refusal.

    subsampled: whether every k-th sample may stand for all. propagated: in which form a Hessian that is carried back
    is kept: "diag", "matrix", or None where it is not.
    """

    subsampled: ClassVar[bool] = False
    propagated: ClassVar[str | None] = None

    @abstractmethod
    def measure(self, stats: Stats, basis: Basis | None = None, due: Collection[str] = WHOLE) -> Tensors:
        """The statistics of some signals, additive over signals, micro-batches and ranks."""

    @abstractmethod
    def product(self, tensors: Tensors, x: Tensor) -> Tensor:
        """C x for x [g, o, d]."""

    @abstractmethod
    def trace(self, tensors: Tensors) -> Tensor:
        """tr C, a 0-d tensor."""

    # ------------------------------------------------------------------- right for what adds up, or refused

    def describe(self, size: int, shape: tuple[int, int, int]) -> str:
        """The sizes of what is kept, as a summary prints them; shape: (g, o, i) of the first layer."""
        return f"{size}"


def damping_tensor(damping: Damping, like: Tensor) -> Tensor:
    return torch.as_tensor(damping, dtype=like.dtype, device=like.device)
