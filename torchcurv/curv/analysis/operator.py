"""Curvature that is never formed: products with the curvature of L over a whole data set.

Each product goes once over the data and differentiates every batch again (hessian/products.py): for a mean loss

    C v = sum_b C_b v / sum_b (1 / R_b),        C_b that of the batch with R = 1

and for a sum loss C v = sum_b C_b v. Memory is that of one batch's graph and of the vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchcurv.curv.analysis.spectra import OverParameters, Vector, seeded
from torchcurv.curv.checks import entry_of, pair_of
from torchcurv.curv.graph import edge_of
from torchcurv.curv.hessian.products import OutputLoss
from torchcurv.curv.kinds.table import KINDS, kind_of
from torchcurv.curv.linalg import stochastic as estimate
from torchcurv.curv.linalg.stochastic import Estimate, SpectralDensity
from torchcurv.curv.losses.loss import Loss
from torchcurv.curv.numerics import at_least_float32
from torchcurv.curv.options import Options
from torchcurv.curv.posterior.draws import call

Batches = Iterable[tuple[Any, Tensor]]
COLUMNS = 16  # vectors that go through the graph of a batch at once, at the most


class CurvatureOperator(OverParameters):
    """The curvature C of a loss over data and all of `params` together, through its products.

    curv_type: "hessian", "ggn" (J^T H_L J), "fisher" (with labels from the model in expectation: equal to the ggn), or
    "empirical_fisher" (sum over samples of the outer products of their gradients).

    Exact for any model that autograd can differentiate twice; batch statistics are differentiated through. The model
    is run in the mode it is in, from the same random state every time, so that dropout and shuffled batches do not
    change C from product to product. Its buffers and the global random state are left as they were.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Batches,
        curv_type: str,
        params: dict[str, Tensor],
        output_fn: Callable[[Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        entry_of("curv_type", curv_type, KINDS).check_matrix_free(curv_type)
        if isinstance(data, Iterator):
            raise ValueError(
                f'data is a {type(data).__name__}, which can be gone over once, and approx="operator" goes over it for '
                "every product: pass a list of batches, or a DataLoader"
            )
        frozen = [name for name, p in params.items() if not p.requires_grad]
        if frozen:
            raise ValueError(
                f"the parameters {', '.join(frozen)} are frozen, and products with them need their gradients: pass "
                "params= without them, or call requires_grad_() on them"
            )
        self._model, self._loss, self._data, self._curv_type = model, loss, data, curv_type
        self._kind = kind_of(curv_type, Options(curv_type=curv_type, approx=None, samples=None))
        self._named, self._output_fn, self._seed = params, output_fn, seed

    def matvec(self, v: Vector) -> Any:
        """C v; one pass over the data, for all the columns of a batch of vectors."""
        columns, restore = self._columns(v)
        sent = [columns[p].detach() for p in self.params]
        total = [at_least_float32(torch.zeros_like(x)) for x in sent]
        shares: Tensor | float = 0.0
        seen = False
        with preserved_buffers(self._model), _same_random_state(self._seed, self.params):
            for x, y in map(pair_of, self._data):
                seen = True
                batch, share = self._batch(x, y)
                shares = shares + share
                if not batch.terms.empty:
                    self._add(total, batch, sent)
        if not seen:
            raise ValueError("data is empty, or could be gone over only once: pass a list of batches, or a DataLoader")
        if isinstance(shares, Tensor) or shares:
            total = [x / shares for x in total]
        return restore(dict(zip(self.params, total, strict=True)))

    def _batch(self, x: Any, y: Tensor) -> tuple[OutputLoss, Tensor | float]:
        """(the loss of a batch, with R = 1 if it is a mean, 1 / R of that mean, or 0)."""
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            f, n = forward(self._model, x, self._output_fn)
        if f.grad_fn is None:
            raise ValueError("the model's output does not depend on any covered parameter")
        terms = self._loss.terms(f, y, n)
        share: Tensor | float = 0.0
        if self._loss.averages(terms):
            terms, share = replace(terms, reduction=1.0), 1 / terms.reduction
        return OutputLoss(self._loss, terms, n, f.detach(), edge_of(f), 1.0), share

    def _add(self, total: list[Tensor], batch: OutputLoss, v: list[Tensor]) -> None:
        """total += C_b v."""
        products = batch.products(self.params, self._kind.output_matvec, self._kind.second_order)
        size = min(COLUMNS, products.at_once(self.size))
        for start in range(0, len(v[0]), size):
            part = slice(start, start + size)
            for x, Cv in zip(total, products([t[part] for t in v]), strict=True):
                x[part] += Cv

    # -------------------------------------------------------------------------------- estimates

    def trace(self, products: int = 60, method: str = "hutch++", generator: torch.Generator | None = None) -> Estimate:
        """tr(C) from as many products, with its standard error; method: "hutch++" or "hutchinson"."""
        return entry_of("method", method, estimate.TRACES)(self._symmetric, products, seeded(generator))

    def diag(self, products: int = 60, generator: torch.Generator | None = None) -> Estimate:
        """The diagonal of C [P] by XDiag from as many products, with its standard error [P].

        Good where few directions carry C; otherwise the error falls with the root of the products, and approx="diag"
        has the exact diagonal of first-order kinds.
        """
        return estimate.xdiag(self._symmetric, products, seeded(generator))

    def norm(
        self, kind: str = "frobenius", products: int | None = None, generator: torch.Generator | None = None
    ) -> Estimate:
        """The norm of C: "frobenius", from 60 products by default, or "spectral", from at most 220."""
        options = {} if products is None else {"products": products}
        return entry_of("kind", kind, estimate.NORMS)(self._symmetric, generator=seeded(generator), **options)

    def logdet(
        self, damping: float, probes: int = 8, steps: int = 64, generator: torch.Generator | None = None
    ) -> Estimate:
        """log det(C + damping I) by stochastic Lanczos quadrature, with its standard error; probes * steps products."""
        return estimate.logdet(self._symmetric, damping, probes, steps, seeded(generator))

    def spectral_density(
        self,
        probes: int = 8,
        steps: int = 64,
        *,
        width: float | None = None,
        grid: Tensor | int = 1000,
        generator: torch.Generator | None = None,
    ) -> SpectralDensity:
        """The density of the eigenvalues by stochastic Lanczos quadrature; probes * steps products.

        width: standard deviation of the Gaussian that smooths it; None: 1 % of the range. grid: the points, or how
        many. See `estimate.SpectralDensity` for what comes back.
        """
        return estimate.spectral_density(self._symmetric, probes, steps, width, grid, seeded(generator))

    def __repr__(self) -> str:
        return f"CurvatureOperator({self._curv_type} over {self.size} parameters)"


def forward(model: nn.Module, x: Any, output_fn: Callable[[Any], Tensor] | None) -> tuple[Tensor, int]:
    """(the tensor f that the loss is applied to, the batch size: that of the model's output, if f is its rows)."""
    output = call(model, x)
    f = output if output_fn is None else output_fn(output)
    if not isinstance(f, Tensor):
        raise TypeError(
            f"the model returned a {type(f).__name__}: pass output_fn=, a function from the model's output to the "
            "tensor that loss_fn is applied to"
        )
    flattened = isinstance(output, Tensor) and f.dim() < output.dim() and f.numel() == output.numel()
    return f, (output if flattened else f).shape[:1].numel()


@contextmanager
def _same_random_state(seed: int, params: list[Tensor]) -> Iterator[None]:
    """The global generators seeded, and afterwards as they were."""
    devices = sorted({p.device.index for p in params if p.device.type == "cuda"})
    with torch.random.fork_rng(devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


@contextmanager
def preserved_buffers(model: nn.Module) -> Any:
    """The buffers as they were (batch norm in train mode updates its statistics in a forward pass)."""
    saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if not torch.equal(buffer, saved[name]):  # a copy would spoil graphs that hold the buffer
                    buffer.copy_(saved[name])
