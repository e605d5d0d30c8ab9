"""DirectionalNewton: Newton steps along eigenvectors of the GGN, each damped by what its samples agree on."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor, nn

from torchcurv.curv.analysis.directions import (
    Criterion,
    DirectionalDamping,
    Directions,
    check_choices,
    directions_of,
    with_gradient_blocks,
)
from torchcurv.curv.block.block import Curvature
from torchcurv.curv.checks import number
from torchcurv.curv.kinds.base import GRADIENT_SHARES
from torchcurv.curv.options import LIVE, BlockOptions, MainOptions, Option, complete, table_of, with_defaults
from torchcurv.optim.base import CurvatureOptimizer
from torchcurv.optim.engine.fallback import descend_uncovered
from torchcurv.optim.engine.report import warn_of_failures
from torchcurv.optim.options import LossOptions, MainLossOption


def top_k(k: int) -> Criterion:
    """The k largest eigenvalues."""
    return lambda evals: torch.arange(max(0, len(evals) - k), len(evals), device=evals.device)


def above(threshold: float) -> Criterion:
    """Eigenvalues larger than a threshold."""
    return lambda evals: (evals > threshold).nonzero().squeeze(1)


def constant(damping: float) -> DirectionalDamping:
    """The same δ along every direction."""
    return lambda evals, gram_evecs, gammas, lambdas: torch.full_like(evals, damping)


def from_noise(least: float = 0.0) -> DirectionalDamping:
    """δ_k = least + se(λ_k) + mean(λ_k) (se(γ_k) / mean γ_k)², se being the standard error of a mean over samples.

    The last term shrinks a step to the part of γ_k that is signal: it multiplies it with γ² / (γ² + se²), the factor
    of least expected error for a mean γ known up to se. Along directions that the samples do not agree on nothing is
    left of the step. One sample alone has no standard error: `least` is then all.
    """

    def damping(evals: Tensor, gram_evecs: Tensor, gammas: Tensor, lambdas: Tensor) -> Tensor:
        def error(x: Tensor) -> Tensor:
            return x.std(0) / len(x) ** 0.5 if len(x) > 1 and x.numel() else torch.zeros_like(x[0])

        tiny = torch.finfo(evals.dtype).tiny
        relative = error(gammas).square() / gammas.mean(0).square().clamp_min(tiny)
        return least + error(lambdas) + lambdas.mean(0) * relative

    return damping


class LearningRate(TypedDict, total=False):
    """Per group."""

    lr: Annotated[float, Option(1.0, number(lambda x: 0 <= x < math.inf, "a finite number >= 0"), LIVE, "step size")]


class DirectionalNewton(CurvatureOptimizer):
    r"""p <- p + lr Σ_k -γ_k / (λ_k + δ_k) e_k over chosen eigenvectors e_k of the GGN of the batch.

    γ_k and λ_k are means over the samples of the first and second derivative of their losses along e_k, and nothing
    happens off these directions. The eigenvectors come from the Gram matrix of the batch's rows, [N C, N C] for N
    samples with C outputs or [N samples, N samples] for drawn signals, and are never formed one by one. There is no
    running average. On several processes the batch is that of all, and every one of them collects all its rows.

    Args:
        model, params, loss_fn, and the options of the whole optimizer: as in SecondOrderOptimizer.
        curv_type: "ggn", "fisher" or "empirical_fisher". samples: as there; None, the default, is the exact curvature.
        criterion: from the eigenvalues above the cut-off, ascending, to the indices of those to step along; `top_k(k)`
            or `above(threshold)`.
        damping: from (evals [K], gram_evecs [rows, K], gammas [N, K], lambdas [N, K]) to δ [K]; `constant(δ)` or
            `from_noise()`.
        lr: step size.
        partition: eigenvectors over "all" parameters, those of each "group", "layer" or "parameter".
        cutoff: eigenvalues up to this times the largest count as zero; None: what rounding makes of zero.
        curvature_samples, gradient_samples: make directions and λ, or γ, of so many samples, the first of each batch;
            None: of all.

    Source: Dangel, Tatzel, Hennig, "ViViT: curvature access through the generalized Gauss-Newton's low-rank structure"
    (2021), with `from_noise` our own.
    """

    over_ranks: ClassVar = True
    table: ClassVar = with_defaults(
        table_of(MainLossOption, MainOptions, BlockOptions, LossOptions, LearningRate),
        approx="full",
        partition="all",
        samples=None,
        rows_limit=1,
        ema_decay=0.0,
    )

    def __init__(
        self,
        model: nn.Module,
        params: Any = None,
        *,
        loss_fn: nn.Module | str | None = "cross_entropy",
        criterion: Criterion,
        damping: DirectionalDamping,
        lr: float = 1.0,
        curv_type: str = "ggn",
        samples: int | None = None,
        partition: str = "all",
        cutoff: float | None = None,
        curvature_samples: int | None = None,
        gradient_samples: int | None = None,
        **options: Unpack[LossOptions],
    ) -> None:
        for name, value, example in (("criterion", criterion, "top_k(10)"), ("damping", damping, "constant(1e-2)")):
            if not callable(value):
                raise TypeError(f"{name}={value!r}; pass a function, such as torchcurv.optim.directional.{example}")
        check_choices(cutoff, curvature_samples, gradient_samples)
        if curv_type in ("hessian", "input"):
            raise ValueError(
                f'curv_type={curv_type!r}; DirectionalNewton reads rows of "ggn", "fisher" or "empirical_fisher"'
            )
        self.settings = {
            "criterion": criterion,
            "damping": damping,
            "cutoff": cutoff,
            "curvature_samples": curvature_samples,
            "gradient_samples": gradient_samples,
        }
        named = {"loss_fn": loss_fn, "lr": lr, "curv_type": curv_type, "samples": samples, "partition": partition}
        chosen = complete(self.table, {**named, **options}, type(self).__name__)
        super().__init__(model, params, chosen, arrange=with_gradient_blocks, factors=False)

    def update_parameters(self) -> None:
        """Newton steps along the chosen directions; plain gradients elsewhere."""
        for block, group in self.engine.by_group():
            if block.kind == GRADIENT_SHARES or not block.average:
                continue
            try:
                newton = self._directions(block).newton(self.settings["damping"])
            except FloatingPointError:  # counted, and no step
                block.health.note_skipped(torch.ones((), dtype=torch.bool, device=block.params[0].device))
                warn_of_failures([block])
                continue
            for piece, x in zip(block.pieces, block.layout.split(newton), strict=True):
                piece.of(piece.param).add_(x, alpha=group["lr"])
        descend_uncovered(self.param_groups, self.engine.blocks)

    def _directions(self, block: Curvature) -> Directions:
        """The chosen directions of a block, while `step` runs (torchcurv.directions looks at a batch on its own)."""
        shares = next(one for one in self.engine.blocks if one.kind == GRADIENT_SHARES and one.layers is block.layers)
        choices = {key: self.settings[key] for key in ("cutoff", "curvature_samples", "gradient_samples")}
        return directions_of(block, shares, self.settings["criterion"], **choices)
