"""The Hessian of the loss with respect to the parameters, by four ways (`hessian_method`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchcurv.curv.hessian.local import EXACT, Treatment
from torchcurv.curv.hessian.products import CurvatureVectorProduct, OutputLoss
from torchcurv.curv.hessian.propagate import propagate
from torchcurv.curv.kinds.base import Block, CurvatureKind, KindOptions, SignalSource
from torchcurv.curv.numerics import random_signs


@dataclass(frozen=True)
class Hessian(CurvatureKind):
    """J^T H_L J + sum_k (dL/df_k) d²f_k/dθ²."""

    name: ClassVar[str] = "hessian"
    checked: ClassVar[bool] = False
    second_order: ClassVar[bool] = True
    indefinite: ClassVar[bool] = True

    @classmethod
    def of(cls, options: KindOptions) -> CurvatureKind:
        return METHODS[options.method](options)

    def output_matvec(self, loss: OutputLoss, v: Tensor) -> Tensor:
        return loss.hessian_matvec(v)


@dataclass(frozen=True)
class DifferentiatedHessian(Hessian):
    """By products that autograd finds, as the approximation of each block asks for them."""

    name: ClassVar[str] = "hessian"
    needs_double_backward: ClassVar[bool] = True

    def measure(self, source: SignalSource, blocks: Sequence[Block]) -> None:
        for block in blocks:
            with source.differentiated() as loss:
                products = loss.products(block.params, self.output_matvec, self.second_order)
                for measured in self.statistics(block, products, source.generator()):
                    block.pending.add(measured)

    def statistics(
        self, block: Block, products: CurvatureVectorProduct, generator: torch.Generator
    ) -> Iterator[dict[str, Any]]:
        """What one block keeps of the Hessian of one loss."""
        yield from block.approx.from_hessian(products, block.layout, generator)


@dataclass(frozen=True)
class HutchinsonHessian(DifferentiatedHessian):
    """Its diagonal, estimated by the mean of z ∘ Hz over random signs z; draws: how many."""

    name: ClassVar[str] = "hessian"
    draws: int = 1

    @property
    def drawn(self) -> int:
        return self.draws

    def statistics(
        self, block: Block, products: CurvatureVectorProduct, generator: torch.Generator
    ) -> Iterator[dict[str, Any]]:
        layout = block.layout
        z = random_signs(products.first[0].new_empty(self.draws, layout.size), generator)
        product = layout.coordinates(products(layout.of_parameters(z, products.params)))
        yield block.approx.of_diagonal_estimate((z * product).mean(0).reshape(layout.factor_shape))


@dataclass(frozen=True)
class PropagatedHessian(Hessian):
    """Carried back from the output to the layers: diagonals, or one matrix for all samples."""

    name: ClassVar[str] = "hessian"
    needs_tape: ClassVar[bool] = True
    form: str = "diag"
    how: Treatment = EXACT

    def measure(self, source: SignalSource, blocks: Sequence[Block]) -> None:
        loss, tape = source.output_loss(), source.tape()
        seed = loss.diagonal() if self.form == "diag" else loss.mean_matrix(self.how.max_dim)
        found = propagate(tape, loss.f_edge, seed, loss.gradients_at, self.form, self.how, source.edges_of(blocks))
        source.deliver_propagated(found, blocks)


@dataclass(frozen=True)
class PriceHessian(Hessian):
    """An estimate over draws of a posterior, from their gradients: no pass measures it."""

    name: ClassVar[str] = "hessian"
    by_passes: ClassVar[bool] = False

    def measure(self, source: SignalSource, blocks: Sequence[Block]) -> None:
        raise ValueError('hessian_method="price" is an estimate over draws of a posterior: use VIOptimizer')


def _propagated(options: KindOptions) -> CurvatureKind:
    form = "diag" if options.approx == "diag" else "matrix"
    how = Treatment(
        options.residual,
        options.residual_over,
        options.hessian_averaging,
        options.max_hessian_dim,
        options.max_chain_products,
    )
    return PropagatedHessian(form, how)


METHODS: dict[str, Callable[[KindOptions], CurvatureKind]] = {
    "exact": lambda options: DifferentiatedHessian(),
    "hutchinson": lambda options: HutchinsonHessian(options.samples or 1),
    "propagate": _propagated,
    "price": lambda options: PriceHessian(),
}
