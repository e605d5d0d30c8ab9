"""What a block measures between two steps: statistics that add up, or rows."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.approximations.base import Tensors
from torchcurv.curv.approximations.factor import Factor
from torchcurv.curv.approximations.factors import LowRankEigen
from torchcurv.curv.approximations.input_covariance import added
from torchcurv.curv.approximations.rows import row_count
from torchcurv.curv.approximations.table import APPROXIMATIONS
from torchcurv.curv.block.layout import BlockLayout
from torchcurv.curv.hessian.products import CurvatureVectorProduct
from torchcurv.curv.kinds.base import HESSIAN, INPUT_COVARIANCE
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.linalg.krylov import Symmetric, eigh
from torchcurv.curv.numerics import random_signs, sum_of
from torchcurv.curv.options import STRUCTURE_NAMES, Options
from torchcurv.curv.statistics.block import Stats


class Measurement(BlockLayout):
    """A block and what was measured for it since the last step (`pending`, or `pending_rows`)."""

    def __init__(self, name: str, layers: list[Layer], options: Options) -> None:
        super().__init__(name, layers)
        assert options.approx is not None
        self.options = options
        self.approx: Any = APPROXIMATIONS[options.approx](options, layers)
        dense = options.approx in ("full", "block")
        self.uses_rows = dense and self.size > options.rows_limit
        self.kind = options.curv_type  # which signals it is sent
        if self.uses_rows and options.curv_type == HESSIAN:
            raise ValueError(
                f"block {name!r} has {self.size} parameters, and its Hessian is kept as a matrix: raise rows_limit="
                f'{options.rows_limit}, or choose approx="unit" or "diag"'
            )
        # Its rows hold what one step measured: no average, nothing to save.
        self.input_rows = self.approx.of_one_step
        self.due_statistics: Collection[str] = self.approx.parts  # what the next passes measure
        self.pending: Tensors = {}
        self.pending_sum: Tensor | None = None  # of all its values: finite if they are
        self.pending_rows: list[Any] = []  # rows (Stats), or eigenpairs of earlier ones
        self.task: int | None = None  # the backward call that the last measurement belongs to
        self.factor: Factor | None = None

    @property
    def captured(self) -> bool:
        return bool(self.pending or self.pending_rows)

    @property
    def by_passes(self) -> bool:
        """Whether curvature passes measure it; Price's estimate of the Hessian is made from draws."""
        return self.kind != HESSIAN or self.options.method != "price"

    @property
    def inputs_alone(self) -> bool:
        """Whether what came in is all that is measured: no signal needs to be sent."""
        alone = tuple(self.due_statistics) == ("A",) and not self.approx.needs_all_signals
        return self.kind == INPUT_COVARIANCE or (self.kind != HESSIAN and alone)

    def sizes(self) -> str:
        """Sizes of the matrices kept, as the summary prints them."""
        return f"rows of {self.size}" if self.uses_rows else self.approx.describe(self.size, self.layers[0].shape)

    def forget_pending(self) -> None:
        self.pending, self.pending_sum, self.pending_rows = {}, None, []

    def begin(self, task: int) -> None:
        """A pass of backward call `task` starts: forget what was measured for gradients that are gone since
        (zero_grad, a step that a GradScaler skipped)."""
        if task != -1 and self.task != task and all(p.grad is None for p in self.params):
            self.forget_pending()
        self.task = task

    @torch.no_grad()
    def measure(self, stats: Stats) -> None:
        """Add one chunk of signals to what was measured since the last step."""
        if self.uses_rows or self.approx.keeps_rows:
            self._keep_rows(stats)
            return
        self.add(self.approx.measure(stats, self.basis, self.due_statistics))

    def _keep_rows(self, stats: Stats) -> None:
        """Rows until the step; of too many for their Gram matrix, the largest eigenpairs."""
        if self.uses_rows:
            self.pending_rows.append(stats)
            return
        for part in stats.parts(self.options.rows_limit):
            self.pending_rows.append(part)
            if row_count(self.pending_rows) > self.options.rows_limit:
                pairs, ok = self.approx.merged([(1.0, self.pending_rows)])
                self.pending_rows = [replace(pairs, values=torch.where(ok, pairs.values, math.nan))]

    def add(self, measured: Tensors) -> None:
        """Add statistics to what was measured since the last step."""
        total = sum_of(list(measured.values()))  # here, where they are still in the cache
        self.pending_sum = total if self.pending_sum is None else self.pending_sum + total
        for key, value in measured.items():
            self.pending[key] = added(key, self.pending[key], value) if key in self.pending else value

    @torch.no_grad()
    def differentiate(self, products: CurvatureVectorProduct, generator: torch.Generator | None = None) -> None:
        """Add the Hessian of one loss: what the approximation keeps of its rows, or of products with random signs."""
        if self.options.method == "price":
            raise ValueError('hessian_method="price" is an estimate over draws of a posterior: use VIOptimizer')
        if self.options.method == "hutchinson":
            draws = self.options.samples or 1
            z = random_signs(products.first[0].new_empty(draws, self.size), generator)
            product = self._coordinates(products(self.of_parameters(z, products.params)))
            self.add({"diag": (z * product).mean(0).reshape(self.layers[0].shape)})
            return
        if self.approx.keeps_rows:
            self.pending_rows.append(self._largest(products, generator))
            return
        for start, rows in products.rows(self.size, lambda units: self.of_parameters(units, products.params)):
            self.add(
                self.approx.from_hessian_rows(start, self._coordinates(rows), [layer.shape for layer in self.layers])
            )

    def _largest(self, products: CurvatureVectorProduct, generator: torch.Generator | None) -> LowRankEigen:
        """The eigenpairs of largest magnitude of the Hessian of one loss, by Lanczos."""
        first = products.first[0]
        like = torch.zeros((), dtype=torch.promote_types(first.dtype, torch.float32), device=first.device)
        if not torch.isfinite(sum_of(list(products.first))):
            return LowRankEigen(
                like.new_full((self.approx.rank,), math.nan), like.new_zeros(self.approx.rank, self.size)
            )

        def times(x: Tensor) -> Tensor:
            return self._coordinates(products(self.of_parameters(x.mT, products.params))).mT

        found = eigh(
            Symmetric(times, self.size, like.dtype, like.device), self.approx.rank, "magnitude", generator=generator
        )
        return LowRankEigen(found.values, found.vectors.mT)

    def _check_rows(self) -> None:
        """Rows are read when they are used, after the backward pass that brought them."""
        for stats in self.pending_rows:
            if stats.edited:
                raise RuntimeError(
                    f"the inputs of block {self.name!r} were edited in place between backward() and step(): its "
                    "curvature is found from them in step(). Give every batch a tensor of its own"
                )

    def scale_pending(self, factor: Tensor | float) -> None:
        """Multiply what was measured since the last step and scales with the loss."""
        for key in self.approx.linear:
            if key in self.pending:
                self.pending[key].mul_(factor)
        self.pending_rows = [part.scaled(factor) for part in self.pending_rows]

    @property
    def basis(self) -> tuple[Tensor, Tensor] | None:
        return None if self.factor is None else self.factor.basis

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two blocks the same: the structure and the parameters."""
        pieces = ((p, rows and rows.start, rows and rows.stop) for p, rows in self.pieces)
        return self.kind, *(getattr(self.options, name) for name in STRUCTURE_NAMES), self.input_rows, *pieces
