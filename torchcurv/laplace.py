"""The Laplace approximation: a Gaussian posterior around trained parameters, from the curvature of their loss.

Notation: θ* the trained parameters, P of them covered; D the data; N the number of loss terms in it; C the curvature
of their mean and E their sum, so that log p(D|θ) = -E(θ) up to a constant; τ temperature; δ prior precision; σ² noise
variance of a regression.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchcurv.curv.analysis.linearised_outputs import LinearisedOutputs
from torchcurv.curv.analysis.measure import curvature
from torchcurv.curv.block.block import Curvature
from torchcurv.curv.bundles import flattened
from torchcurv.curv.checks import check_count
from torchcurv.curv.losses.likelihood import Likelihood, LikelihoodMeter, double
from torchcurv.curv.losses.loss import Loss
from torchcurv.curv.losses.table import loss_of
from torchcurv.curv.posterior.draws import temporary_values
from torchcurv.curv.posterior.gaussian import Gaussian, GaussianBlock, Number, sum_of_terms
from torchcurv.curv.posterior.linearised import Network
from torchcurv.curv.posterior.settings import Precision, as_number, check_positive, checked_noise, precisions_of
from torchcurv.curv.posterior.weight_posterior import PriorTerm, WeightPosterior

_FIXED = {  # options of a training run, and what stands in their place
    "damping": "the damping is prior_precision",
    "damping_type": "the damping is exact",
    "ema_decay": "all of the data is measured once",
    "update_every": "all of the data is measured once",
    "refactor_every": "all of the data is measured once",
}


class GLM(NamedTuple):
    """A normal distribution over the outputs of every sample: mean [N, C], covariance [N, C, C]."""

    mean: Tensor
    covariance: Tensor


def laplace(
    model: nn.Module,
    loss_fn: nn.Module | str,
    data: Iterable[tuple[Any, Tensor]],
    *,
    curv_type: str = "ggn",
    approx: str = "kfac",
    prior_precision: Precision = 1.0,
    temperature: float = 1.0,
    noise_variance: float | None = None,
    params: Iterable[Tensor] | Iterable[tuple[str, Tensor]] | None = None,
    samples: int | None = None,
    reduction: str | None = None,
    class_dim: int | None = None,
    output_fn: Callable[[Any], Tensor] | None = None,
    seed: int = 0,
    **options: Any,
) -> LaplacePosterior:
    r"""The Laplace posterior N(θ*, Σ) of a trained model over all of `data`:

        Σ^-1 = (N/τ) C + δ I

    C is the curvature of the mean loss and N the number of its terms, so that N C is that of their sum; whether
    `loss_fn` is a mean or a sum makes no difference. A squared error is read as the Gaussian likelihood
    -log p(y|f) = Σ (f - y)² / (2σ²) + const, and brought to this scale: torch's has no ½, and its mean divides by the
    elements.

    θ* should minimise the sum of the terms over τ plus ½ δ |θ|², that is a mean of them with weight_decay = τ δ / N.
    Call `model.eval()` first: the mode of the model is left as it is, and dropout would be part of what is measured.

        posterior = torchcurv.laplace(model, nn.CrossEntropyLoss(), loader)
        posterior.optimize_prior()
        probabilities = posterior.predict_probit(x)

    Args:
        model: holds θ*, which are copied; later training does not move the posterior.
        loss_fn, data, curv_type, approx, params, samples, reduction, class_dim, output_fn: as in
            `torchcurv.curvature`. Parameters that are not covered count as known exactly.
        prior_precision: δ of the prior N(0, 1/δ), a number > 0, a tensor with one per block, or a dict by block name.
        temperature: τ; 1 is the Bayesian posterior, smaller is colder.
        noise_variance: σ² of a regression; 1 by default. Only for squared errors.
        seed: of the posterior's own draws, and of the signals if there are `samples`.
        options: `sharing`, `rows_limit`, `factor_blocks`, `max_factor_dim`, and those of the Hessian, as in
            `torchcurv.curv.options`. Damping is exact.

    The Hessian is taken as it is (`indefinite="keep"`), which is right at a minimum; elsewhere its sum with the prior
    may have no inverse, which raises, and "abs" or "clip" make one.

    Raises:
        ValueError, TypeError: on arguments that are not allowed, saying what is; where the precision is not positive.

    Sources: MacKay, "A practical Bayesian framework for backpropagation networks" (1992); Ritter et al., "A scalable
    Laplace approximation for neural networks" (2018); Immer et al., "Improving predictions of Bayesian neural nets via
    local linearization" (2008.08400) and "Scalable marginal likelihood estimation" (2104.04975); Daxberger et al.,
    "Laplace redux" (2106.14806).
    """
    flat = flattened({"curv_type": curv_type, "approx": approx, **options})
    curv_type, approx, options = flat.pop("curv_type"), flat.pop("approx"), flat
    _check_options(curv_type, approx, options)
    check_positive("temperature", temperature)
    loss = loss_of(loss_fn, reduction, class_dim)
    noise = checked_noise(noise_variance, loss, loss_fn)
    if approx == "ekfac" and iter(data) is data:  # it is gone over twice
        data = list(data)
    seen = LikelihoodMeter(data, loss, output_fn)
    measured = curvature(
        model, loss_fn, seen, curv_type=curv_type, approx=approx, params=params, samples=samples, reduction=reduction,
        class_dim=class_dim, output_fn=seen.note, seed=seed, **options,
    )  # fmt: skip
    covered = set(measured.params)
    names: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p in covered}
    blocks = list(measured.blocks.values())
    return LaplacePosterior(
        model, names, blocks, seen.likelihood(), prior_precision, temperature, noise, loss, output_fn, seed
    )


class LaplacePosterior(WeightPosterior):
    """The posterior N(θ*, Σ), Σ^-1 = (N/τ) C + δ I, over the covered parameters; see `torchcurv.laplace`.

    `prior_precision`, `temperature` and `noise_variance` may be set, and count from then on; θ* and C stay.
    Parameters by name are those of `model.named_parameters()`.
    """

    def __init__(
        self,
        model: nn.Module,
        params: dict[str, Tensor],
        blocks: list[Curvature],
        likelihood: Likelihood,
        prior_precision: Precision,
        temperature: float,
        noise_variance: float | None,
        loss: Loss,
        output_fn: Callable[[Any], Tensor] | None,
        seed: int,
    ) -> None:
        self.model, self.likelihood = model, likelihood
        self._names, self._blocks, self._loss = params, blocks, loss
        self._mean = {p: p.detach().clone() for p in params.values()}
        self.linearised = LinearisedOutputs(Network(model, output_fn), params, self._mean)
        self._values = [_eigenvalues(block) for block in blocks]
        self._norms = [_square_norm(block, self._mean) for block in blocks]
        self._generator = torch.Generator(blocks[0].params[0].device).manual_seed(seed)
        self._temperature, self._noise_variance = float(temperature), noise_variance
        self.prior_precision = prior_precision

    # ------------------------------------------------------------------------------------- settings

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks, between which the posterior is independent."""
        return [block.name for block in self._blocks]

    @property
    def prior_precision(self) -> Precision:
        """δ, as it was set."""
        return self._prior_precision

    @prior_precision.setter
    def prior_precision(self, value: Precision) -> None:
        self._check_definite(precisions_of(value, self.blocks), self._scale(self._noise_variance))
        self._prior_precision = value

    @property
    def temperature(self) -> float:
        """τ."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        check_positive("temperature", value)
        self._temperature = float(value)

    @property
    def noise_variance(self) -> float | None:
        """σ² of a regression, else None."""
        return self._noise_variance

    @noise_variance.setter
    def noise_variance(self, value: float | None) -> None:
        self._noise_variance = checked_noise(value, self._loss, self._loss.name)

    def _scale(self, noise_variance: Number | None) -> Number:
        """From the curvature that was measured to that of E / τ."""
        return self.likelihood.factor / self._temperature / (1.0 if noise_variance is None else noise_variance)

    def _check_definite(self, precisions: list[Number], scale: Number) -> None:
        for block, values, delta in zip(self._blocks, self._values, precisions, strict=True):
            least = float(values.amin()) * as_number(scale) + as_number(delta)
            if not least > 0:
                raise ValueError(
                    f"the precision of block {block.name!r} has the eigenvalue {least:.4g}, and no Gaussian has it. "
                    f"Train the model to a minimum, raise prior_precision={as_number(delta):.4g}, or choose "
                    "indefinite='clip' or curv_type='ggn'"
                )

    # ------------------------------------------------------------------------------- the distribution

    @property
    def gaussian(self) -> Gaussian:
        """The distribution by parameter, as it is now."""
        return Gaussian(self._mean, self._gaussian_blocks())

    def _gaussian_blocks(self) -> list[GaussianBlock]:
        scale, precisions = self._scale(self._noise_variance), precisions_of(self._prior_precision, self.blocks)
        self._check_definite(precisions, scale)
        return [
            GaussianBlock(block, scale, as_number(delta) / scale)
            for block, delta in zip(self._blocks, precisions, strict=True)
        ]

    @torch.no_grad()
    def sample(self, generator: torch.Generator | None = None, count: int | None = None) -> dict[str, Tensor]:
        """A draw by name, or `count` of them [count, ...]; generator: None is the posterior's own."""
        if count is not None:
            check_count("count", count)
        return self._by_name(self.gaussian.sample(generator or self._generator, count))

    def named_parameters(self) -> dict[str, Tensor]:
        """The covered parameters by name."""
        return self._names

    def prior_terms(self) -> Iterable[PriorTerm]:
        """The prior of each block."""
        pairs = zip(self._gaussian_blocks(), precisions_of(self._prior_precision, self.blocks), strict=True)
        return [(block, delta, 1.0) for block, delta in pairs]

    def drawn_params(self, generator: torch.Generator | None) -> AbstractContextManager[None]:
        """See `sampled_params`."""
        return self.sampled_params(generator)

    def _by_name(self, tensors: dict[Tensor, Tensor]) -> dict[str, Tensor]:
        return {name: tensors[p] for name, p in self._names.items()}

    # ------------------------------------------------------------------------------------------ draws

    @contextmanager
    def sampled_params(self, generator: torch.Generator | None = None) -> Iterator[None]:
        """The parameters of the model hold a draw; what they held before comes back on exit, bit for bit, also after
        an exception.

        generator: on the device of the parameters; None: the posterior's own, seeded by `seed`.
        """
        with torch.no_grad():
            drawn = self.gaussian.sample(generator or self._generator)
        with temporary_values(drawn):
            yield

    # ------------------------------------------------------------------------- the marginal likelihood

    def log_marginal_likelihood(
        self, prior_precision: Precision | None = None, noise_variance: Number | None = None
    ) -> Tensor:
        """Laplace's approximation of the evidence, log p(D|δ, σ²), a 0-d tensor in float64:

            (1/τ) log p(D|θ*) + log p(θ*|δ) + ½ P log 2π - ½ log det Σ^-1

        It is differentiable, exactly so, with respect to the tensors given, θ* being held fixed. For a model that is
        linear in its parameters, squared errors, and θ* the maximum of the posterior, it is the evidence itself.

        prior_precision, noise_variance: in place of the posterior's own, which stay.
        """
        precisions = precisions_of(self._prior_precision if prior_precision is None else prior_precision, self.blocks)
        noise = self._noise_variance if noise_variance is None else self._noise_given(noise_variance)
        scale = self._scale(noise)
        self._check_definite(precisions, scale)
        total = self.likelihood.log_prob(noise) / self._temperature
        for values, norm, delta in zip(self._values, self._norms, map(double, precisions), strict=True):
            prior = len(values) * delta.log() - delta * norm
            total = total + 0.5 * (prior - (values * double(scale) + delta).log().sum())
        return total

    def _noise_given(self, value: Number) -> Number:
        checked_noise(as_number(value), self._loss, self._loss.name)
        return value

    def optimize_prior(
        self, steps: int = 100, lr: float = 0.1, *, per_block: bool = False, noise: bool = False
    ) -> Tensor:
        """Set the prior precision to where the marginal likelihood is largest, by Adam on its logarithm.

        θ* is held fixed, so that this is one half of the alternation of training and prior (2104.04975).

        Args:
            per_block: a precision for each block; one for all by default, unless each has its own already.
            noise: whether the noise variance is found too; of a regression only.
        Returns: the log marginal likelihood before each step and after the last [steps + 1].
        """
        check_count("steps", steps)
        check_positive("lr", lr)
        if noise and self._noise_variance is None:
            raise ValueError(f"noise=True, and the likelihood of {self._loss.name} has none: leave noise out")
        logs = self._log_precisions(per_block).requires_grad_()
        log_noise = torch.tensor(math.log(self._noise_variance or 1.0), dtype=torch.float64, requires_grad=noise)
        optimizer = torch.optim.Adam([logs, log_noise] if noise else [logs], lr, maximize=True)
        history = []
        for step in range(steps + 1):
            with torch.enable_grad():
                evidence = self.log_marginal_likelihood(logs.exp(), log_noise.exp() if noise else None)
            history.append(evidence.detach())
            if step < steps:
                optimizer.zero_grad()
                evidence.backward()
                optimizer.step()
        if noise:
            self._noise_variance = float(log_noise.detach().exp())
        self.prior_precision = logs.detach().exp() if logs.dim() else float(logs.detach().exp())
        return torch.stack(history)

    def _log_precisions(self, per_block: bool) -> Tensor:
        """Where the search begins: 0-d, or one per block."""
        value = self._prior_precision
        each = torch.stack([double(x).detach() for x in precisions_of(value, self.blocks)]).log()
        return each if per_block or isinstance(value, dict) or (isinstance(value, Tensor) and value.dim()) else each[0]

    # --------------------------------------------------------------------------- linearised predictions

    @torch.no_grad()
    def glm(self, inputs: Any, chunk_size: int | None = None) -> GLM:
        """The outputs of the model linearised in its parameters, N(f(x; θ*), J Σ J^T) with J = df/dθ at θ*.

        Outputs of a sample are flattened to C of them: mean [N, C], covariance [N, C, C]. This is the distribution of
        f; `predict_regression` adds the noise. Parameters that are not covered count as known exactly.

        inputs: as in `predict`, but no function, with the samples in dimension 0 of every tensor. They must not
            interact, as in batch norm in train mode; a model in eval mode is gone through layer by layer, which is
            faster but for approx="full".
        chunk_size: samples whose Jacobians are held at a time; None: as many as have about 2^24 elements.

        Source: Immer et al. (2008.08400).
        """
        if chunk_size is not None:
            check_count("chunk_size", chunk_size)
        if callable(inputs):
            raise TypeError("glm differentiates the model itself: pass what it is called with, not a function")
        mean, covariance = self.linearised(self._gaussian_blocks(), inputs, chunk_size)
        return GLM(mean.reshape(covariance.shape[:2]), covariance)

    def predict_regression(self, inputs: Any, chunk_size: int | None = None) -> GLM:
        """The linearised distribution of the targets of a regression, N(f(x; θ*), J Σ J^T + σ² I); see `glm`."""
        if self._noise_variance is None:
            raise ValueError(f"predict_regression is of squared errors, not {self._loss.name}: use predict_probit")
        mean, covariance = self.glm(inputs, chunk_size)
        return GLM(mean, covariance + self._noise_variance * torch.eye(mean.shape[1]).to(covariance))

    def predict_probit(self, inputs: Any, chunk_size: int | None = None) -> Tensor:
        """Class probabilities in the shape of f: softmax(f / sqrt(1 + π/8 v)), v its linearised variances (see `glm`).

        Of "bce_with_logits" the probabilities of every element, with the logistic function in place of the softmax.
        Source: MacKay, "The evidence framework applied to classification networks" (1992); Gibbs (1997).
        """
        f, covariance = self.linearised(self._gaussian_blocks(), inputs, chunk_size)
        variances = covariance.diagonal(dim1=1, dim2=2).reshape(f.shape)
        canonical, restore = self._loss.layout(f, len(covariance))
        return restore(self._loss.formula.predictive(canonical, self._loss.layout(variances, len(covariance))[0]))

    def __repr__(self) -> str:
        size = sum(block.size for block in self._blocks)
        return f"LaplacePosterior({len(self._blocks)} blocks over {size} parameters)"


# ---------------------------------------------------------------------------------------------- helpers


def _eigenvalues(block: Curvature) -> Tensor:
    """Of the block's C, in float64 on the CPU, as is all of the marginal likelihood."""
    assert block.factor is not None and hasattr(block.factor, "eigvalsh")
    values = block.factor.eigvalsh().cpu().double()
    if not torch.isfinite(values).all():
        raise ValueError(f"the curvature of block {block.name!r} is not finite: look at the data and the outputs")
    return values


def _square_norm(block: Curvature, mean: dict[Tensor, Tensor]) -> Tensor:
    return sum_of_terms([piece.of(mean[piece.param]).cpu().double().square().sum() for piece in block.pieces])


def _check_options(curv_type: str, approx: str | None, options: dict[str, Any]) -> None:
    for name in _FIXED.keys() & options.keys():
        raise ValueError(f"{name}={options[name]!r}: {_FIXED[name]}; leave {name} out")
    if approx in (None, "operator"):
        raise ValueError(f'approx={approx!r} has no factor to draw with: choose "kfac", "full" or "diag", for example')
    if curv_type == "input":
        raise ValueError('curv_type="input" is the curvature of no likelihood: choose "ggn", "hessian" or a Fisher')
