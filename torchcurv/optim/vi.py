"""VIOptimizer: variational inference with a Gaussian whose precision is a curvature of any kind and shape.

The mean of the posterior is what the parameters hold outside of `sampled_params`; the covariance lies in the factors
of the blocks (torchcurv.curv.posterior.gaussian). Notation: N terms of the loss in the data, τ temperature, δ prior
precision, δ̃ = τ δ / N, C the running average of the curvature of the mean loss, μ the mean, θ a draw, ĝ the mean
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from torchcurv.curv.bundles import Bundle, Damping, Hessian, Refresh, given_options
from torchcurv.curv.losses.table import loss_of
from torchcurv.curv.options import MainOptions, complete, table_of, with_defaults
from torchcurv.curv.posterior.gaussian import Gaussian, GaussianBlock, kl_of_block, sum_of_terms
from torchcurv.curv.posterior.weight_posterior import PriorTerm, WeightPosterior
from torchcurv.optim.base import CurvatureOptimizer
from torchcurv.optim.control.kl_clip import checked_kl_clip
from torchcurv.optim.control.kl_clip import kl_clip as clipped
from torchcurv.optim.draw_records import holds_its_mean
from torchcurv.optim.engine.companion import Momentum, buffer_of
from torchcurv.optim.engine.damping import Group, PosteriorDamping
from torchcurv.optim.options import KLClipOption, MainLossOption, MainStepOptions, VariationalOptions
from torchcurv.optim.posterior_draws import LOOKING, PosteriorDraws
from torchcurv.optim.price import estimate, is_priced
from torchcurv.optim.prior import (
    OutputMeter,
    check_positive,
    check_posterior_block,
    checked_noise,
    checked_warmup,
    needs_draw_factor,
    prior_damping,
    temperature_at,
)
from torchcurv.optim.rules import price_starts_positive, sums_are_counted
from torchcurv.optim.update import descend_, momentum_


class VIOptimizer(CurvatureOptimizer, WeightPosterior):
    r"""Variational inference: a Gaussian posterior N(μ, Σ) with Σ^-1 = (N/τ) (C + δ̃), trained by natural gradients.

    It minimises N E_q[mean loss] + τ KL(q || N(0, 1/δ)). Every draw is a forward and a backward at

        θ = μ + sqrt(τ/N) (C + δ̃)^-1/2 ε,          δ̃ = τ δ / N

    and a step averages gradients and curvatures over the draws since the last one:

        C <- running average,   m <- momentum m + ν (C + δ̃ + damping)^-1 (ĝ + δ̃ μ),   μ <- μ - lr m

    The first draws are from the prior, or of precision `init_precision`, unless a step from a backward at the mean
    precedes them. Within one step either all gradients come from draws, or all from the mean.

        for x, y in loader:
            optimizer.zero_grad()
            for _ in range(2):                                 # two draws
                with optimizer.sampled_params():
                    F.cross_entropy(model(x), y).backward()
            optimizer.step()
        logits = optimizer.predict(x, num_samples=16)          # [16, batch, classes]

    The loss may be reduced by its mean or its sum, which is divided by its terms. Micro-batches of one draw belong
    into one `with`, their mean losses divided by their number; those in a `with` of their own are draws, and not
    divided. Parameters in groups with prior_precision=None, or with approx=None, are not drawn.

    A wide network at a draw from its prior is far from anything that can be trained: start it with init_precision of
    the order of N, or with a step from the mean; and take a damping as for SecondOrderOptimizer, since C + δ̃ alone is
    nearly singular.

    Args:
        model, params, loss_fn, approx, curv_type and everything not named here: as for SecondOrderOptimizer.
        dataset_size: N, the number of loss terms in the data: labels of a classification, elements of "mse" and
            "bce_with_logits"; with `noise_variance`, samples.
        prior_precision: δ of the prior N(0, 1/δ), per group; None: no posterior and no prior for these parameters.
        temperature: τ, per group; 1 is the Bayesian posterior, smaller is colder.
        kl_warmup: what τ is multiplied by, a function of the step to a number > 0; or a number of steps over which
            it grows linearly to 1.
        num_samples: draws that `step(closure)` makes. antithetic: every second of the optimizer's own draws is the
            mirror image μ - (θ - μ) of the one before, in the next step too if that has not changed Σ, so that with
            update_every=10 one draw per step makes pairs. Each alone is a draw from the posterior. The second of a
            pair costs next to nothing, and θ - μ is kept for it: as much memory as the drawn parameters.
        shared_noise: the optimizer's own draws, as long as Σ is the same, have one ε but for random signs of its rows
            (over the outputs of a layer, or over its inputs where these are more) where the covariance is a Kronecker
            product: approx="kfac" and "ekfac". Each alone is a draw from the posterior, and any two are uncorrelated;
            they cost one product instead of two. That with ε is kept: as much memory as the drawn parameters.
        init_precision: Σ^-1 of the first draws, per group; None: that of the prior.
        draws: of several processes, "different" in each, which are more draws, or the "same" in all. Price's estimate
            needs the same, and has them.
        noise_variance: σ² of a Gaussian likelihood, for losses that are the mean or the sum of squared errors.
        update_every, refactor_every: with "auto" or a function of the step that is 1 at first, the covariance follows
            the first steps of training, where curvature changes fast and a step by an old one can be the last.
        lr, momentum: of the mean. kl_clip: bounds the step by ν <= 1 as in SecondOrderOptimizer.
        damping: λ >= 0 added to C + δ̃ in the step, but not in Σ.
        damping_type: "exact", or "factored": Σ is then the inverse of the two damped Kronecker factors, which is
            smaller than the exact one, down to a few percent in flat directions.
        hessian_method: also "price" for curv_type="hessian", approx="diag", which needs no pass: with β = ema_decay,
            f = (N/τ) (h + δ̃) mean[(θ - μ) ĝ] and h <- h + (1-β) (f - h) + ½ (1-β)² (h - f)² / (h + δ̃).
            It wants β near 1 and init_precision > prior_precision.

    Raises:
        ValueError, TypeError: on arguments that are not allowed, saying what is.
        RuntimeError: from `step` inside of `sampled_params`, or where curvature is missing.

    Sources: Khan et al., "Fast and scalable Bayesian deep learning by weight-perturbation in Adam" (1806.04854);
    Zhang et al., "Noisy natural gradient as variational inference" (1712.02390); Osawa et al., "Practical deep
    learning with Bayesian principles" (1906.02506); Shen et al., "Variational learning is effective for large deep
    networks" (2402.17641).
    """

    over_ranks: ClassVar = True
    table: ClassVar = with_defaults(
        table_of(MainLossOption, MainOptions, MainStepOptions, KLClipOption, VariationalOptions),
        momentum=0.0,
        damping=0.0,
        kl_clip=1.0,
        damping_type="exact",
        ema_decay=0.99,
    )

    def __init__(
        self,
        model: nn.Module,
        dataset_size: float,
        params: Any = None,
        *,
        loss_fn: nn.Module | str | None = "cross_entropy",
        curv_type: str | Hessian = "ggn",
        approx: str | Bundle | None = "kfac",
        lr: float | Tensor = 0.1,
        momentum: float = 0.0,
        damping: float | Tensor | Damping = 0.0,
        kl_clip: float | None = 1.0,
        refresh: Refresh | None = None,
        **options: Unpack[VariationalOptions],
    ) -> None:
        named = {"loss_fn": loss_fn, "curv_type": curv_type, "approx": approx, "lr": lr, "momentum": momentum}
        given = given_options({**named, "kl_clip": kl_clip}, damping, (refresh,), options)
        chosen = complete(self.table, given, type(self).__name__)
        check_positive("dataset_size", dataset_size, "the number of loss terms in the data, a number > 0")
        loss = None if loss_fn is None else loss_of(loss_fn, chosen["reduction"], chosen["class_dim"])
        self.settings = {
            "dataset_size": float(dataset_size),
            "num_samples": chosen["num_samples"],
            "antithetic": chosen["antithetic"],
            "shared_noise": chosen["shared_noise"],
            "draws": chosen["draws"],
            "noise_variance": checked_noise(chosen["noise_variance"], loss_fn),
            "kl_warmup": checked_warmup(chosen["kl_warmup"]),
            "kl_clip": checked_kl_clip(kl_clip),
            "summed": loss is not None and loss.reduction == "sum",
            "outputs": {},  # elements of a sample of the output, as last seen
        }
        super().__init__(
            model,
            params,
            chosen,
            rules=(price_starts_positive, sums_are_counted),
            damping=PosteriorDamping(partial(prior_damping, self.settings), needs_draw_factor),
            block_rules=(check_posterior_block,),
            companions=(PosteriorDraws, OutputMeter, Momentum),
        )

    # --------------------------------------------------------------------------------- the posterior

    @property
    def _draws(self) -> PosteriorDraws:
        return self.companion(PosteriorDraws)

    def gaussian_blocks(self) -> list[tuple[GaussianBlock, Group]]:
        """The blocks with a posterior, and their groups."""
        pairs = []
        for block, group in self.engine.by_group():
            if group["prior_precision"] is not None:
                step = self.engine.step
                scale = self.settings["dataset_size"] / temperature_at(self.settings, group, step)
                damping = prior_damping(self.settings, group, step)
                start = 0.0 if group["init_precision"] is None else group["init_precision"] / scale - damping
                pairs.append((GaussianBlock(block, scale, damping, start), group))
        return pairs

    @property
    def gaussian(self) -> Gaussian:
        """q over the parameters that are drawn, as it is now; its mean holds all parameters, μ in float32 or better."""
        blocks = [block for block, _ in self.gaussian_blocks()]
        return Gaussian({p: self._draws.mean(p) for p in self.engine.params()}, blocks)

    @property
    def posterior(self) -> Gaussian:
        """The same."""
        return self.gaussian

    def named_parameters(self) -> dict[str, Tensor]:
        """All parameters given to the optimizer, by name."""
        names = self.engine.blueprint.names
        return {names[p]: p for p in self.engine.params()}

    def prior_terms(self) -> list[PriorTerm]:
        """The prior of each block, N(0, 1/δ) with the δ of its group, and its temperature τ."""
        pairs = self.gaussian_blocks()
        step = self.engine.step
        return [(block, g["prior_precision"], temperature_at(self.settings, g, step)) for block, g in pairs]

    def drawn_params(self, generator: torch.Generator | None) -> AbstractContextManager[None]:
        """The parameters hold a draw to look at, of a stream of its own."""
        return self._draws.at(self._draws.draw(LOOKING, generator))

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One draw by name, of all parameters given to the optimizer; those without a posterior are at their mean."""
        drawn, _ = self._draws.draw(LOOKING, generator)
        return {
            name: mean + drawn[p] if (p := self._param(name)) in drawn else mean for name, mean in self.mean.items()
        }

    def _param(self, name: str) -> Tensor:
        assert self.model is not None
        return self.model.get_parameter(name)

    @torch.no_grad()
    def elbo(self, loss: float | Tensor) -> Tensor:
        """-N E_q[mean loss] - τ KL(q || prior), a bound on the log evidence for τ = 1.

        loss: an estimate of E_q of the loss reduced by its mean, over draws and the data. With noise_variance the
        likelihood is that of the normal distribution, with its normalising constant.
        """
        expected = -self.settings["dataset_size"] * self._likelihood_factor() * loss
        if self.settings["noise_variance"] is not None:
            constant = self._seen_outputs() / 2 * math.log(2 * math.pi * self.settings["noise_variance"])
            expected = expected - self.settings["dataset_size"] * constant
        return expected - self._tempered_kl()

    def _tempered_kl(self) -> Tensor:
        """τ KL(q || prior)."""
        mean = self.gaussian.mean
        return sum_of_terms([kl_of_block(block, mean, delta) * tau for block, delta, tau in self.prior_terms()])

    # ----------------------------------------------------------------------------------------- draws

    @contextmanager
    def sampled_params(self, generator: torch.Generator | None = None) -> Iterator[None]:
        """The parameters hold a draw from the posterior; forward and backward inside. The mean comes back on exit,
        bit for bit, also after an exception; what is written into drawn parameters inside is lost.

        generator: of the draw, on the device of the parameters; None: the optimizer's own, seeded by `seed`, whose
            draws a resumed run repeats.
        """
        with self._draws.at_next(generator):
            yield

    # ------------------------------------------------------------------------------------------ step

    def run_closure(self, closure: Callable[[], Any] | None) -> Any:
        """closure: computes the loss and calls backward(), with or without zero_grad() before; it is run under
        `num_samples` draws, and its mean loss is returned. Gradients of draws add up in `.grad`.
        """
        draws = self._draws
        if draws.held is not None:
            raise RuntimeError("step() inside of sampled_params(): leave the `with` first, which restores the mean")
        loss = None if closure is None else draws.run(closure, self.settings["num_samples"])
        draws.step_begins()
        self._factor = self._gradient_factor()
        self.engine.schedule.apply(self.engine.step)  # the memory of Price's estimate is asked for before the others
        self._scale_measured(self._factor)
        return loss

    def _device(self) -> torch.device:
        return next(self.engine.params()).device

    def _likelihood_factor(self) -> float:
        """From the loss, reduced by its mean, to the mean negative log likelihood: C / 2σ² of squared errors."""
        if self.settings["noise_variance"] is None:
            return 1.0
        formula = loss_of(self.engine.recording["loss_fn"]).formula
        return self._seen_outputs() / (formula.factor * self.settings["noise_variance"])

    def _seen_outputs(self) -> int:
        if not self.settings["outputs"]:
            raise RuntimeError(
                "noise_variance needs the number of outputs of a sample, and the model has not been called since the "
                "optimizer was built"
            )
        return self.settings["outputs"]["size"]

    def _gradient_factor(self) -> float | Tensor:
        """From what lies in `.grad` to the mean gradient of the mean negative log likelihood."""
        recorder = self.engine.recorder
        assert recorder is not None
        unseen = self.settings["noise_variance"] is not None and not self.settings["outputs"]
        if unseen or all(p.grad is None for p in self.engine.params()):
            return 1.0  # nothing to step on; or the step of a checkpoint library, without a forward pass
        likelihood, summed = self._likelihood_factor(), recorder.summed
        if summed is None:
            return likelihood / max(1, self._draws.made)
        if self.engine.ranks.count > 1:  # whose gradients are averaged: so are their numbers of terms
            summed = self.engine.ranks.mean(torch.as_tensor(summed, dtype=torch.float64, device=self._device()))
        return likelihood / (summed.clamp_min(1) if isinstance(summed, Tensor) else max(1, summed))

    def _scale_measured(self, factor: float | Tensor) -> None:
        """What was measured of sums over draws and terms becomes that of means."""
        for block in self.engine.blocks:
            if block.pending and not _is_one(factor):
                block.pending.scale(factor)
        products, recorder = self._draws.products, self.engine.recorder
        if self.engine.ranks.count > 1:  # all have had the same draws
            products = {p: self.engine.ranks.mean(x) for p, x in products.items()}
        if products and recorder is not None:
            for part, group in self.gaussian_blocks():
                if is_priced(part.block):
                    estimate(part, products, group["ema_decay"], factor / recorder.settings.scale())

    def update_parameters(self) -> None:
        """μ <- μ - lr m, with the gradients of the draws and of the prior."""
        gradients, means = self._gradients()
        solved = self.engine.precondition(gradients)
        known = clipped(self.param_groups, gradients, solved, self.settings["kl_clip"])
        self.noted.update(known)
        clip = known.get("clip")
        for group in self.param_groups:
            params = [p for p in group["params"] if p in gradients]
            steps = [solved[p] if p in solved else gradients[p] for p in params]
            if clip is not None:
                steps = [x * clip if p in solved else x for p, x in zip(params, steps, strict=True)]
            if group["momentum"]:
                steps = momentum_([buffer_of(self.state[p], p) for p in params], steps, group["momentum"], False)
            descend_([means[p] for p in params], steps, group["lr"], 0.0)
            for p in params:
                if not holds_its_mean(p):
                    p.copy_(means[p])

    def _gradients(self) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """(ĝ + δ̃ μ, μ) by parameter."""
        gradients: dict[Tensor, Tensor] = {}
        means: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            own = [self._draws.mean(p) for p in params]
            means.update(zip(params, own, strict=True))
            pairs = [(p.grad, x) for p, x in zip(params, own, strict=True)]
            grads = [g if g.dtype == x.dtype else g.to(x.dtype) for g, x in pairs]
            damping = prior_damping(self.settings, group, self.engine.step)
            if params and not _is_one(self._factor):
                grads = list(torch._foreach_mul(grads, self._factor))
            if params and damping:
                grads = list(torch._foreach_add(grads, own, alpha=damping))
            gradients.update(zip(params, grads, strict=True))
        return gradients, means


def VOGN(model: nn.Module, dataset_size: float, params: Any = None, **options: Any) -> VIOptimizer:
    """VIOptimizer with the diagonal of the empirical Fisher (Khan et al., 1806.04854); options: as there."""
    return VIOptimizer(model, dataset_size, params, **{"curv_type": "empirical_fisher", "approx": "diag", **options})


def NoisyKFAC(model: nn.Module, dataset_size: float, params: Any = None, **options: Any) -> VIOptimizer:
    """VIOptimizer with the K-FAC of the Fisher (Zhang et al., 1712.02390), curv_type="ggn" being its less noisy
    equal; options: as there."""
    return VIOptimizer(model, dataset_size, params, **{"curv_type": "fisher", "approx": "kfac", **options})


def _is_one(factor: float | Tensor) -> bool:
    return not isinstance(factor, Tensor) and factor == 1
