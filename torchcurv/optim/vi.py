"""VIOptimizer: variational inference with a Gaussian whose precision is a curvature of any kind and shape.

The mean of the posterior is what the parameters hold outside of `sampled_params`; the covariance lies in the factors
of the blocks (torchcurv.curv.posterior.gaussian). Notation: N terms of the loss in the data, τ temperature, δ prior
precision, δ̃ = τ δ / N, C the running average of the curvature of the mean loss, μ the mean, θ a draw, ĝ the mean
gradient.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.capture.hooks import Hook
from torchcurv.curv.checks import check_count, check_number
from torchcurv.curv.kinds.base import SECOND
from torchcurv.curv.losses.table import loss_of
from torchcurv.curv.options import OPTION_NAMES
from torchcurv.curv.posterior.draws import outputs_under
from torchcurv.curv.posterior.gaussian import Gaussian, GaussianBlock, kl_of_block
from torchcurv.optim.base import WHOLE_OPTIONS, CurvatureOptimizer, moved
from torchcurv.optim.posterior_draws import Aside, Kept, Shared, Spread, changed, is_wide, marks_of, mean_of
from torchcurv.optim.second_order import check_step_options, checked_kl_clip
from torchcurv.optim.update import descend_, momentum_

POSTERIOR_OPTIONS = ("prior_precision", "temperature", "init_precision")  # per group
_STEP_OPTIONS = ("lr", "momentum")
_NO_STEP_OPTIONS = {"weight_decay": 0.0, "l2": 0.0, "nesterov": False, "maximize": False}
_BAKED = ("kfac", "unit", "block", "full")  # shapes whose "factored" factor has its damping inside
_TRAINING, _LOOKING = "training_draws", "other_draws"  # streams of draws, and under which keys the state counts them
_NOISE = "shared_noise"  # the stream of noise that draws share; the state has the draw it was made for, or 0
_STREAMS = {_LOOKING: 0, _TRAINING: 1, _NOISE: 2}  # in seeds


class VIOptimizer(CurvatureOptimizer):
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

    _copied: ClassVar[tuple[str, ...]] = (
        *(*CurvatureOptimizer._copied, "_dataset_size", "_num_samples", "_antithetic", "_share_noise", "_warmup"),
        *("_outputs", "_summed", "_kl_clip", "_noise_variance"),
    )
    _held: dict[Tensor, Tensor] | None = None  # the means, while the parameters hold a draw
    _made: int  # draws since the last step whose gradients are in `.grad`
    _curved: dict[Tensor, Tensor]  # their sum of (θ - μ) g, for hessian_method="price"
    _kept: Kept | None = None  # with antithetic=True, the last draw, until its mirror image is drawn
    _shared: Shared | None = None  # with shared_noise=True, what the draws share
    _watch: Any = None

    def __init__(
        self,
        model: nn.Module,
        dataset_size: float,
        params: Any = None,
        *,
        loss_fn: nn.Module | str | None = "cross_entropy",
        curv_type: str = "ggn",
        approx: str | None = "kfac",
        prior_precision: float | None = 1.0,
        temperature: float = 1.0,
        num_samples: int = 1,
        lr: float | Tensor = 0.1,
        momentum: float = 0.0,
        damping: float | Tensor = 0.0,
        kl_clip: float | None = 1.0,
        init_precision: float | None = None,
        noise_variance: float | None = None,
        antithetic: bool = False,
        shared_noise: bool = False,
        kl_warmup: int | Callable[[int], float] | None = None,
        samples: int | None = 1,
        sharing: str = "expand",
        damping_type: str = "exact",
        ema_decay: float = 0.99,
        update_every: int | str | Callable[[int], int] = 1,
        refactor_every: int | str | Callable[[int], int] = 1,
        refresh_tol: float = 0.1,
        refresh_cap: int = 100,
        refresh_warmup: int = 10,
        rows_limit: int = 2048,
        hessian_method: str | None = None,
        residual: str = "keep",
        max_hessian_dim: int = 2048,
        indefinite: str = "abs",
        factor_blocks: int = 1,
        max_factor_dim: int | None = 8192,
        max_positions: int | None = None,
        partition: str | None = None,
        rank: int = 16,
        reduction: str | None = None,
        class_dim: int | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        grad_scaler: Any = None,
        unsupported: str = "error",
        seed: int = 0,
    ) -> None:
        given = locals()
        _check_positive("dataset_size", dataset_size, "the number of loss terms in the data, a number > 0")
        check_count("num_samples", num_samples)
        for name, value in (("antithetic", antithetic), ("shared_noise", shared_noise)):
            if not isinstance(value, bool):
                raise TypeError(f"{name}={value!r}; pass True or False")
        self._dataset_size, self._num_samples = float(dataset_size), num_samples
        self._antithetic, self._share_noise = antithetic, shared_noise
        self._noise_variance, self._warmup = _checked_noise(noise_variance, loss_fn), _checked_warmup(kl_warmup)
        self._kl_clip = checked_kl_clip(kl_clip)
        self._outputs: dict[str, int] = {}  # elements of a sample of the output, as last seen
        self._summed = loss_fn is not None and loss_of(loss_fn, reduction, class_dim).reduction == "sum"
        self._forget_draws()
        super().__init__(
            model,
            params,
            {name: given[name] for name in (*_STEP_OPTIONS, *POSTERIOR_OPTIONS)},
            {name: given[name] for name in OPTION_NAMES},
            **{name: given[name] for name in WHOLE_OPTIONS},
        )

    # ------------------------------------------------------------------------------------- groups

    def _check_group(self, group: dict[str, Any]) -> None:
        for key in POSTERIOR_OPTIONS:
            if group[key] is not None or key == "temperature":
                _check_positive(key, group[key], "a number > 0" + ("" if key == "temperature" else ", or None"))
        super()._check_group(group)
        check_step_options({**_NO_STEP_OPTIONS, "momentum_type": "preconditioned", **group})
        if self._summed and group["approx"] is not None and group["update_every"] != 1:
            raise ValueError(
                f"update_every={group['update_every']!r} with a loss that is a sum: its terms are counted where its "
                "curvature is measured. Pass update_every=1, or reduce the loss by its mean"
            )

    def _draws_apart(self, group: dict[str, Any]) -> bool:
        """Whether one inverse cannot have the damping of the step and that of the draws."""
        baked = group["damping_type"] == "factored" and group["approx"] in _BAKED and group["curv_type"] != "hessian"
        return baked and group["prior_precision"] is not None and not _no_damping(group["damping"])

    def _is_damped(self, group: dict[str, Any]) -> bool:
        return group["prior_precision"] is not None or super()._is_damped(group)

    def _check_price(self, group: dict[str, Any]) -> None:
        delta, start = group["prior_precision"], group["init_precision"]
        if delta is None:
            raise ValueError('hessian_method="price" needs draws: pass a prior_precision, a number > 0')
        if start is None or start <= delta:
            raise ValueError(
                f'init_precision={start!r}; hessian_method="price" starts from a curvature > 0: pass a number greater '
                f"than prior_precision={delta!r}, such as dataset_size times the curvature of the mean loss to expect"
            )
        if self._summed:
            raise ValueError(
                'hessian_method="price" makes no pass in which the terms of a sum could be counted: reduce the loss by '
                "its mean"
            )

    def _check_block(self, block: Curvature, index: int) -> None:
        super()._check_block(block, index)
        group_of = {p: k for k, group in enumerate(self.param_groups) for p in group["params"]}
        one = self.param_groups[index]
        for p in block.params:
            other = self.param_groups[group_of[p]]
            for key in POSTERIOR_OPTIONS:
                if one[key] != other[key]:
                    raise ValueError(
                        f"the parameters {self._names[block.params[0]]} and {self._names[p]} belong to one block but "
                        f"have {key}={one[key]!r} and {key}={other[key]!r}: these must agree within a layer, and "
                        'between all layers of approx="full"'
                    )
        if block.uses_rows and one["prior_precision"] is not None:
            raise ValueError(
                f"block {block.name!r} has {block.size} parameters, more than rows_limit={block.options.rows_limit}, "
                "and rows do not outlive a step, as a posterior must: raise rows_limit, or choose another approx"
            )

    def _install(self, blocks: list[Curvature], group_of: dict[int, int]) -> None:
        super()._install(blocks, group_of)
        for block, index in zip(self._blocks, self._group_index, strict=True):
            if block.factor is None:
                block.draws_apart = self._draws_apart(self.param_groups[index])
        if self._noise_variance is None or self._watch is not None:
            return
        assert self.model is not None
        seen = partial(_note_outputs, self._outputs, self._settings["output_fn"])
        self._watch = weakref.finalize(self, self.model.register_forward_hook(Hook(seen)).remove)

    def _refactor(self, block: Curvature, group: dict[str, Any]) -> None:
        block.draws_apart = self._draws_apart(group)
        block.refactor(self._damping(group), self._prior_damping(group))

    def _is_due(self, block: Curvature, index: int) -> bool:
        due = super()._is_due(block, index)
        return due or (block.draws_apart and moved(self._prior_damping(self.param_groups[index]), block.draw_damping))

    def _restore(self) -> None:
        self._forget_draws()
        self._kept = self._shared = None
        super()._restore()

    def remove(self) -> None:
        """Take every hook off the model and the loss; the optimizer keeps its state."""
        super().remove()
        if self._watch is not None:
            self._watch()

    # --------------------------------------------------------------------------------- the posterior

    def _temperature(self, group: dict[str, Any]) -> float:
        return group["temperature"] * (1.0 if self._warmup is None else _warm(self._warmup, self._steps))

    def _prior_damping(self, group: dict[str, Any]) -> float:
        """δ̃, 0 where there is no prior."""
        delta = group["prior_precision"]
        return 0.0 if delta is None else self._temperature(group) * delta / self._dataset_size

    def _damping(self, group: dict[str, Any]) -> float | Tensor:
        return self._prior_damping(group) + group["damping"]

    def _gaussian_blocks(self) -> list[tuple[GaussianBlock, dict[str, Any]]]:
        """The blocks with a posterior, and their groups."""
        pairs = []
        for block, index in zip(self._blocks, self._group_index, strict=True):
            group = self.param_groups[index]
            if group["prior_precision"] is not None:
                scale, damping = self._dataset_size / self._temperature(group), self._prior_damping(group)
                start = 0.0 if group["init_precision"] is None else group["init_precision"] / scale - damping
                pairs.append((GaussianBlock(block, scale, damping, start), group))
        return pairs

    def _drawn_blocks(self) -> list[GaussianBlock]:
        return [block for block, _ in self._gaussian_blocks()]

    def _mean(self, p: Tensor) -> Tensor:
        """μ of a parameter, in float32 or better: itself, or its master copy."""
        if self._held is not None and p in self._held:
            return self._held[p]
        if p.dtype == torch.promote_types(p.dtype, torch.float32):
            return p.detach()
        master = self.state[p].get("mean")
        if master is None:
            master = p.detach().float()
        else:  # what was written into the parameter since the last step counts
            master = torch.where(master.to(p.dtype) == p.detach(), master, p.detach().float())
        self.state[p]["mean"] = master
        return master

    @property
    def posterior(self) -> Gaussian:
        """q over the parameters that are drawn, as it is now; its mean holds all parameters."""
        self._require_record()
        return Gaussian({p: self._mean(p) for p in self._params()}, self._drawn_blocks())

    @property
    def mean(self) -> dict[str, Tensor]:
        """μ by name, of all parameters given to the optimizer; float32 or better."""
        return {self._names[p]: self._mean(p).clone() for p in self._params()}

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """One draw by name, of all parameters given to the optimizer; those without a posterior are at their mean."""
        drawn, _ = self._deviation(_LOOKING, generator)
        return {
            name: mean + drawn[p] if (p := self._param(name)) in drawn else mean for name, mean in self.mean.items()
        }

    def _param(self, name: str) -> Tensor:
        assert self.model is not None
        return self.model.get_parameter(name)

    @torch.no_grad()
    def log_prob(self, params: dict[str, Tensor] | None = None) -> Tensor:
        """log q of parameters by name (leading dimensions are a batch), or of the weights as they are."""
        values: dict[Tensor, Tensor] = {p: p.detach() for p in self._params()}
        if params is not None:
            missing = [self._names[p] for p in values if self._names[p] not in params]
            if missing:
                raise ValueError(f"log_prob: values are missing for {', '.join(missing)}; pass what `sample()` returns")
            values = {p: params[self._names[p]] for p in values}
        return self.posterior.log_prob(values)

    @torch.no_grad()
    def entropy(self) -> Tensor:
        """Entropy of q in nats, over the parameters that are drawn."""
        return self.posterior.entropy()

    @torch.no_grad()
    def kl(self) -> Tensor:
        """KL(q || N(0, 1/δ)) in nats, over the parameters that are drawn, δ being that of their group."""
        return self._tempered_kl(lambda group: 1.0)

    def _tempered_kl(self, factor: Callable[[dict[str, Any]], float]) -> Tensor:
        pairs, mean = self._gaussian_blocks(), {p: self._mean(p) for p in self._params()}
        terms = [kl_of_block(block, mean, group["prior_precision"]) * factor(group) for block, group in pairs]
        return torch.stack(terms).sum() if terms else torch.zeros(())

    @torch.no_grad()
    def elbo(self, loss: float | Tensor) -> Tensor:
        """-N E_q[mean loss] - τ KL(q || prior), a bound on the log evidence for τ = 1.

        loss: an estimate of E_q of the loss reduced by its mean, over draws and the data. With noise_variance the
        likelihood is that of the normal distribution, with its normalising constant.
        """
        expected = -self._dataset_size * self._likelihood_factor() * loss
        if self._noise_variance is not None:
            constant = self._seen_outputs() / 2 * math.log(2 * math.pi * self._noise_variance)
            expected = expected - self._dataset_size * constant
        return expected - self._tempered_kl(self._temperature)

    # ----------------------------------------------------------------------------------------- draws

    @property
    def _first_state(self) -> dict[str, Any]:
        """The state of the first parameter, which has what is about all of them."""
        return self.state[next(iter(self._params()))]

    def _next_draw(self, stream: str) -> tuple[int, float]:
        """(which noise the next draw of a stream has, its sign); the state counts the draws."""
        state = self._first_state
        count = state[stream] = int(state.get(stream, 0)) + 1
        if self._antithetic and stream == _TRAINING:
            return (count + 1) // 2, 1.0 if count % 2 else -1.0
        return count, 1.0

    def _generator(self, stream: str, index: int, device: torch.device) -> torch.Generator:
        # Price's estimate multiplies a draw with its own gradient, which is an average over the ranks
        alike = self._priced() or not torch.distributed.is_initialized()
        rank = 0 if alike else torch.distributed.get_rank()
        seed = hash((self._settings["seed"], _STREAMS[stream], index, rank, 0x5EED)) & (2**63 - 1)
        return torch.Generator(device).manual_seed(seed)

    @torch.no_grad()
    def _deviation(self, stream: str, generator: torch.Generator | None) -> tuple[dict[Tensor, Tensor], float]:
        """(x, sign) with θ - μ = sign x of a draw, by parameter.

        The second of a pair has the noise of the first, and is made from it unless the optimizer was loaded, or Σ
        edited, in between.
        """
        self._require_record()
        if self._held is not None:
            raise RuntimeError("the weights are drawn already: leave the `with` of sampled_params() first")
        blocks = self._drawn_blocks()
        posterior = Gaussian({}, blocks)
        if generator is not None or not blocks:
            return posterior.deviation(generator), 1.0
        index, sign = self._next_draw(stream)
        if stream == _TRAINING:
            kept, self._kept = self._kept, None
            if sign < 0 and kept is not None and kept.noise == index and kept.spread.is_of(blocks):
                return kept.deviation, sign
        generator = self._generator(stream, index, blocks[0].block.params[0].device)
        shared = self._share_noise and stream == _TRAINING
        deviation = self._sharing(index, posterior)(generator) if shared else posterior.deviation(generator)
        if stream == _TRAINING and self._antithetic and sign > 0:
            self._kept = Kept(index, deviation, Spread(blocks))
        return deviation, sign

    def _sharing(self, index: int, posterior: Gaussian) -> Callable[[torch.Generator | None], dict[Tensor, Tensor]]:
        """What makes draws of the noise that they share; index: of the next draw.

        A resumed run, or one whose Σ was edited, has the same noise.
        """
        state, blocks = self._first_state, posterior.blocks
        noise = state[_NOISE] = int(state.get(_NOISE, 0)) or index
        if self._shared is None or self._shared.noise != noise or not self._shared.spread.is_of(blocks):
            generator = self._generator(_NOISE, noise, blocks[0].block.params[0].device)
            self._shared = Shared(noise, posterior.draws(generator), Spread(blocks))
        return self._shared.make

    @contextmanager
    def _drawn(self, deviation: dict[Tensor, Tensor], sign: float) -> Iterator[None]:
        """The parameters at μ + sign * deviation; the bits they had come back."""
        params = list(deviation)
        with torch.no_grad():
            before = [p.detach().clone() for p in params]
            means = [x if is_wide(p) else self._mean(p) for p, x in zip(params, before, strict=True)]
        try:
            with torch.no_grad():
                for p, mean in zip(params, means, strict=True):
                    if is_wide(p):  # which holds its mean
                        p.add_(deviation[p], alpha=sign)
                    else:
                        p.copy_(mean.add(deviation[p], alpha=sign))
            self._held = dict(zip(params, means, strict=True))
            yield
        finally:
            self._held = None
            with torch.no_grad():
                _copy(params, before)

    @contextmanager
    def sampled_params(self, generator: torch.Generator | None = None) -> Iterator[None]:
        """The parameters hold a draw from the posterior; forward and backward inside. The mean comes back on exit,
        bit for bit, also after an exception; what is written into drawn parameters inside is lost.

        generator: of the draw, on the device of the parameters; None: the optimizer's own, seeded by `seed`, whose
            draws a resumed run repeats.
        """
        with self._drawn(*self._deviation(_TRAINING, generator)):
            marks = marks_of(self._params())
            if not marks:
                self._forget_draws()
            priced = self._priced()
            before = {p: p.grad.clone() for p in priced if p.grad is not None}
            yield
            if changed(self._params(), marks):
                self._made += 1
                self._note_curved(priced, {p: x for p, x in before.items() if marks[p][0]() is p.grad})

    def _priced(self) -> list[Tensor]:
        return [p for block in self._blocks if _is_priced(block) for p in block.params]

    @torch.no_grad()
    def _note_curved(self, priced: list[Tensor], before: dict[Tensor, Tensor]) -> None:
        """Add (θ - μ) g of the draw that ends."""
        for p in priced:
            if p.grad is None:
                continue
            gradient = p.grad - before[p] if p in before else p.grad
            self._add_curved({p: (p - self._mean(p)) * gradient})

    def _add_curved(self, products: dict[Tensor, Tensor]) -> None:
        for p, product in products.items():
            self._curved[p] = self._curved[p] + product if p in self._curved else product

    def _forget_draws(self) -> None:
        self._made, self._curved = 0, {}

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._forget_draws()
        if self._record is not None:
            self._record.summed = None

    @torch.no_grad()
    def predict(self, inputs: Any, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
        """The model's raw outputs under `num_samples` draws [num_samples, ...], without gradients.

        inputs: what the model is called with (a tensor, a tuple of positional or a dict of keyword arguments), or a
            function without arguments that returns a tensor. The mode of the model (train, eval) is left as it is.
        """
        check_count("num_samples", num_samples)
        assert self.model is not None
        draws = (self._drawn(*self._deviation(_LOOKING, generator)) for _ in range(num_samples))
        return outputs_under(draws, self.model, inputs)

    # ------------------------------------------------------------------------------------------ step

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update from the gradients in `.grad`, averaged over the draws they come from.

        closure: computes the loss and calls backward(), with or without zero_grad() before; it is run under
            `num_samples` draws, and its mean loss is returned. Gradients of draws add up in `.grad`.
        """
        if self._held is not None:
            raise RuntimeError("step() inside of sampled_params(): leave the `with` first, which restores the mean")
        loss = None if closure is None else self._run(closure)
        self._last = {"loss": loss.detach()} if isinstance(loss, Tensor) and not loss.dim() else {}
        with torch.no_grad():
            spread = Spread(self._drawn_blocks()) if self._antithetic or self._share_noise else None
            factor = self._gradient_factor()
            self._apply_schedules()  # the memory of Price's estimate is asked for before the others
            self._scale_measured(factor)
            if self._refresh():
                self._descend(factor)
                self._finish_step()
                if spread is not None and not spread.is_of(self._drawn_blocks()):
                    self._end_noise()
        return loss

    def _run(self, closure: Callable[[], Any]) -> Any:
        """The closure under draws of its own; gradients and curvatures are put aside between them."""
        self._require_record()
        aside, losses = Aside(), []
        for left in reversed(range(self._num_samples)):
            with torch.enable_grad(), self.sampled_params():
                losses.append(closure())
            if left:
                aside.take(self)
        if self._num_samples > 1:
            aside.give_back(self)
        return mean_of(losses)

    def _likelihood_factor(self) -> float:
        """From the loss, reduced by its mean, to the mean negative log likelihood: C / 2σ² of squared errors."""
        if self._noise_variance is None:
            return 1.0
        return self._seen_outputs() / (loss_of(self._settings["loss_fn"]).formula.factor * self._noise_variance)

    def _seen_outputs(self) -> int:
        if not self._outputs:
            raise RuntimeError(
                "noise_variance needs the number of outputs of a sample, and the model has not been called since the "
                "optimizer was built"
            )
        return self._outputs["size"]

    def _gradient_factor(self) -> float | Tensor:
        """From what lies in `.grad` to the mean gradient of the mean negative log likelihood."""
        summed = self._require_record().summed
        if all(p.grad is None for p in self._params()) or (self._noise_variance is not None and not self._outputs):
            return 1.0  # nothing to step on; or the step of a checkpoint library, without a forward pass
        likelihood = self._likelihood_factor()
        if summed is None:
            return likelihood / max(1, self._made)
        return likelihood / (summed.clamp_min(1) if isinstance(summed, Tensor) else max(1, summed))

    def _scale_measured(self, factor: float | Tensor) -> None:
        for block in self._blocks:
            if block.captured and not _is_one(factor):
                block.scale_pending(factor)
        if self._curved:
            for part, group in self._gaussian_blocks():
                if _is_priced(part.block):
                    self._estimate(part, group["ema_decay"], factor)

    def _estimate(self, part: GaussianBlock, beta: float, factor: float | Tensor) -> None:
        """What the running average of Price's estimate becomes, as the block's measurement."""
        block = part.block
        curved = {p: self._curved.get(p, torch.zeros_like(self._mean(p))) for p in block.params}
        products = block.join([piece.of(curved[piece.param]) for piece in block.pieces])[0]
        products = products * (factor / self._require_record().loss_scale())
        h = block.tensors.get("diag", torch.full_like(products, float(part.start)))
        block.add({"diag": price_average(h, products, part.scale, part.damping, beta)})

    def _memory(self, block: Curvature, group: dict[str, Any]) -> float:
        return 0.0 if _is_priced(block) else group["ema_decay"]

    def _due(self) -> list[str]:
        priced = {block.name for block in self._blocks if _is_priced(block)}
        return [name for name in super()._due() if name not in priced]

    def _silent_trigger(self, loss_fn: nn.Module | str | None) -> str:
        if self._priced() and not self._made:
            return (
                'hessian_method="price" estimates the curvature from draws, and no backward() was called inside of '
                "sampled_params() (or by step(closure))"
            )
        return super()._silent_trigger(loss_fn)

    def _descend(self, factor: float | Tensor) -> None:
        gradients: dict[Tensor, Tensor] = {}
        means: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            own = [self._mean(p) for p in params]
            means.update(zip(params, own, strict=True))
            grads = [
                p.grad if p.grad.dtype == x.dtype else p.grad.to(x.dtype) for p, x in zip(params, own, strict=True)
            ]
            damping = self._prior_damping(group)
            if params and not _is_one(factor):
                grads = list(torch._foreach_mul(grads, factor))
            if params and damping:
                grads = list(torch._foreach_add(grads, own, alpha=damping))
            gradients.update(zip(params, grads, strict=True))
        solved = self._solve(gradients)
        clip = self._clip(gradients, solved)
        for group in self.param_groups:
            params = [p for p in group["params"] if p in gradients]
            steps = [solved[p] if p in solved else gradients[p] for p in params]
            if clip is not None:
                steps = [x * clip if p in solved else x for p, x in zip(params, steps, strict=True)]
            if group["momentum"]:
                steps = momentum_([self._buffer(self.state[p], p) for p in params], steps, group["momentum"], False)
            descend_([means[p] for p in params], steps, group["lr"], 0.0)
            for p in params:
                if not is_wide(p):
                    p.copy_(means[p])

    def _end_noise(self) -> None:
        """Σ has changed: the next draw is no mirror image, and has noise of its own."""
        self._kept = self._shared = None
        first = self._first_state
        if self._antithetic:
            first[_TRAINING] = first.get(_TRAINING, 0) + first.get(_TRAINING, 0) % 2
        first[_NOISE] = 0

    def _finish_step(self) -> None:
        self._forget_draws()
        super()._finish_step()

    def _save_param(self, state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
        super()._save_param(state, p, group)
        if group["momentum"]:
            self._buffer(state, p)
        if not is_wide(p):
            self._mean(p)
        if p is next(iter(self._params())):
            for stream in _STREAMS:
                state.setdefault(stream, 0)


def VOGN(model: nn.Module, dataset_size: float, params: Any = None, **options: Any) -> VIOptimizer:
    """VIOptimizer with the diagonal of the empirical Fisher (Khan et al., 1806.04854); options: as there."""
    return VIOptimizer(model, dataset_size, params, **{"curv_type": "empirical_fisher", "approx": "diag", **options})


def NoisyKFAC(model: nn.Module, dataset_size: float, params: Any = None, **options: Any) -> VIOptimizer:
    """VIOptimizer with the K-FAC of the Fisher (Zhang et al., 1712.02390), curv_type="ggn" being its less noisy
    equal; options: as there."""
    return VIOptimizer(model, dataset_size, params, **{"curv_type": "fisher", "approx": "kfac", **options})


def price_average(h: Tensor, products: Tensor, scale: float | Tensor, damping: float | Tensor, beta: float) -> Tensor:
    """h + (1-β) (f - h) + ½ (1-β)² (h - f)² / (h + δ̃) with f = scale (h + δ̃) products.

    products: mean of (θ - μ) ∘ ĝ over draws of variance 1 / (scale (h + δ̃)). The last term keeps
    h + δ̃ = (h + δ̃) (1 + x + x²/2), x = (1-β) (f - h) / (h + δ̃), positive (Shen et al., 2402.17641).
    """
    damped = h + damping
    change = (scale * damped * products - h) * (1 - beta)
    return h + change + 0.5 * change.square() / damped


# ---------------------------------------------------------------------------------------------- helpers


def _copy(params: list[Tensor], values: list[Tensor]) -> None:
    if params:
        torch._foreach_copy_(params, values)


def _is_priced(block: Curvature) -> bool:
    return block.options.curv_type == SECOND and block.options.method == "price"


def _is_one(factor: float | Tensor) -> bool:
    return not isinstance(factor, Tensor) and factor == 1


def _note_outputs(
    seen: dict[str, int], output_fn: Callable[[Any], Any] | None, module: nn.Module, args: Any, output: Any
) -> None:
    f = output if output_fn is None else output_fn(output)
    if isinstance(f, Tensor) and f.dim() and len(f):
        seen["size"] = f.numel() // len(f)


def _no_damping(damping: float | Tensor) -> bool:
    return not isinstance(damping, Tensor) and damping == 0


def _check_positive(name: str, value: Any, allowed: str) -> None:
    check_number(name, value, lambda x: 0 < x < math.inf, allowed)


def _checked_noise(noise_variance: float | None, loss_fn: nn.Module | str | None) -> float | None:
    if noise_variance is None:
        return None
    _check_positive("noise_variance", noise_variance, "a number > 0, or None")
    if loss_fn is None or not loss_of(loss_fn).formula.gaussian:
        raise ValueError(
            f"noise_variance is that of a Gaussian likelihood, and loss_fn={loss_fn!r} is none: pass 'mse' or "
            "nn.MSELoss(), or noise_variance=None"
        )
    return float(noise_variance)


def _checked_warmup(warmup: int | Callable[[int], float] | None) -> int | Callable[[int], float] | None:
    number = isinstance(warmup, int) and not isinstance(warmup, bool) and warmup >= 1
    if not (warmup is None or callable(warmup) or number):
        raise ValueError(
            f"kl_warmup={warmup!r}; pass a number of steps, an int of at least 1, or a function of the step to what "
            "the temperature is multiplied by, or None"
        )
    if warmup is not None:
        _warm(warmup, 0)  # raises on what is no number > 0
    return warmup


def _warm(warmup: int | Callable[[int], float], step: int) -> float:
    if not callable(warmup):
        return min(1.0, (step + 1) / warmup)
    factor = warmup(step)
    _check_positive(f"the value of kl_warmup at step {step}", factor, "a number > 0 from it")
    return factor
