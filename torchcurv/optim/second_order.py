"""SecondOrderOptimizer: gradient descent along (C + λ I)^-1 g."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from torchcurv.curv.bundles import AdaptiveDamping, Bundle, Damping, Hessian, QuadraticModel, Refresh, given_options
from torchcurv.curv.options import MainOptions, complete, table_of, with_defaults
from torchcurv.optim.base import CurvatureOptimizer
from torchcurv.optim.control.damping_rules import DAMPING_RULES
from torchcurv.optim.control.kl_clip import checked_kl_clip
from torchcurv.optim.control.step_control import StepControl
from torchcurv.optim.control.step_rules import STEP_RULES, Descent, with_momentum
from torchcurv.optim.engine.companion import Momentum
from torchcurv.optim.engine.damping import is_of_the_loss
from torchcurv.optim.options import MainLossOption, MainStepOptions, SecondOrderOptions
from torchcurv.optim.rules import lm_descends_by_numbers, nesterov_has_momentum, no_price, quadratic_is_plain

CONTROL = (
    *("step_rule", "model_samples", "damping_rule", "damping_interval", "damping_decay", "damping_bounds"),
    *("curvature_warmup", "kl_clip"),
)


class SecondOrderOptimizer(CurvatureOptimizer):
    r"""Preconditioned gradient descent with the curvature of each layer.

    For a gradient g (maximize flips its sign, `l2` adds l2 * p to it) and the curvature C of the loss

        V = (C + (damping + l2) I)^-1 g                 approx=None: V = g
        ν = min(1, sqrt(kl_clip / Σ lr² <V, g>))        one number for all covered parameters; 1 if kl_clip is None
        m = momentum * m + ν V,  p = (1 - lr * weight_decay) p - lr * m

    For curv_type="input", whose C is not in units of the loss, V = damping (C + damping I)^-1 g and ν = 1: such a
    group tends to the plain gradient as its damping grows.

    With step_rule="quadratic" the step is m <- α V + β m, p <- p - lr m, with the α and β for which the quadratic model
    of the loss of the batch is least at d = -m,

        q(d) = g·d + ½ d^T (G + damping + l2) d,    G its Gauss-Newton matrix: exact, by products with its Jacobian

    and a coefficient of their own for plain gradients and for directions of input curvature. Where the loss curves less
    along V than the running average C, which it does when it falls fast, a relative damping counts in q by the share
    V^T G V / V^T C V of it, but by 0.01 at least.

    With damping_rule="lm" (Levenberg and Marquardt) the damping of every group is divided by ω = damping_decay^T if, on
    the batch of every T-th step (ω = damping_decay for each of the first T, and after a rejected step),

        ρ = (L(θ + d) - L(θ)) / (g·d + ½ d^T (G + l2) d)

    is below ¼, and multiplied with ω if it is above ¾; if the loss of that batch rose, the step is rejected. A batch
    fits any model that has more directions than the batch has outputs (samples times classes, or pixels): where
    Σ tr C (C + λ)^-1 over the blocks is above 4.5 times these, the damping is divided by ω whatever ρ is, and above two
    thirds of that it is not made smaller.

    The coefficient β of the last step is kept between 0 and 1.1. Where the loss of a batch is twice the mean of those
    before, and of its own loss before the last step, that step is rejected, this one is checked, and the damping is
    divided by damping_decay^T: small batches are fitted by steps that do harm to the others.

    Of batches larger than `model_samples` so many are drawn at random (subsampled): in products with G, and in
    L(θ + d) - L(θ) but for its first order g·d. K-FAC factors are then made of a part as well: of as many samples as
    give each 16 rows (samples times positions) per row and column, where half of the batch has these.

    Both need `step(closure)`, with a closure that returns the loss, or (loss, output), without calling backward():

        optimizer = SecondOrderOptimizer(model, step_rule="quadratic", damping_rule="lm")
        for x, y in loader:
            optimizer.step(lambda: F.cross_entropy(model(x), y))

    Args:
        model: the module to train. It gets removable forward hooks and nothing else.
        params: what torch.optim takes (parameters, named parameters, groups); None means every trainable parameter.
            Groups may set any curvature or step option below.
        loss_fn: the loss module you call, or the name of the loss you compute: "cross_entropy", "mse",
            "bce_with_logits", "nll"; None: you call `observe(output, target, loss_fn)` before backward().
            A name means mean reduction, no class weights and a factor of 1 in what backward() is called on.
        curv_type: "ggn" (Gauss-Newton), "fisher", "empirical_fisher", "hessian", or "input" (ISAAC).
        approx: "kfac", "ekfac", "diag", "unit" (one block per output unit), "block" (per layer), "full", "lowrank" (the
            `rank` largest eigenpairs), or None.
        lr: step size, a number or a 0-d tensor. None: 0.1, or 0.3 for curv_type="input", or 1 for
            step_rule="quadratic", where it multiplies what
            the model has chosen.
        momentum: 0 <= momentum < 1; for step_rule="quadratic" any but 0 lets the model choose. nesterov: look ahead.
        momentum_type: "preconditioned" averages V, "raw" averages g before preconditioning.
        damping: λ > 0, a number, a 0-d tensor, or a function of the step; for damping_rule="lm" the first value. None:
            0.01, or 0.03 if it is relative. damping_type: "factored" or "exact" (through eigenvectors).
        damping_scale: "absolute": λ is in units of the loss's curvature. "relative": it is the damping times the mean
            eigenvalue of each block, tr C / dim C, so that no loss, width or layer has units of its own. "auto":
            relative for step_rule="quadratic" with damping_rule="lm", else absolute.
        kl_clip: bound κ on lr² <V, g>, or for step_rule="quadratic" on m^T G m, its trust region; None: no clipping.
            "auto" is 0.01, and None for step_rule="quadratic".
        weight_decay: decoupled decay. l2: coefficient of l2/2 norm(p)² in the loss, in g and in the damping.
        maximize: ascend.
        trust_ratio: V of every tensor is scaled to the norm of the tensor, where that is above 1e-2 (LARS). After the
            KL clip, which then has no effect on it.
        normalize_weights: after each step every tensor that moved and has two or more dimensions has norm sqrt(2 o),
            for o = p.shape[0] outputs: for weights in front of a normalisation, whose scale means nothing.
        step_rule: "fixed", or "quadratic". model_samples: so many of a larger batch stand for it; None: it is taken as
            a whole. Fewer are faster, and fit a model to themselves: 125 let classifiers diverge.
        damping_rule: "fixed", or "lm", with damping_interval = T, damping_decay, and damping_bounds of λ; None: 1e-4 to
            1e8 if it is relative, else from 1e-8.
        step, refresh: bundles in the place of flat options: `torchcurv.QuadraticModel`, `torchcurv.Refresh`. So may be
            curv_type (`Hessian`), approx (`KFAC`, `EKFAC`, `LowRank`) and damping (`Damping`, `AdaptiveDamping`).
        curvature_warmup: the first so many steps measure curvature and leave the parameters alone.
        samples: signals drawn per step; None: the exact curvature (one backward pass per output element).
        update_every, refactor_every: an int, a function of the step, "adaptive", or "auto": 1 in the first 10 steps,
            where curvature changes fast, and then 10; always 1 for curv_type="input" and for approx="full" and "block",
            which may be made of the rows of one batch.
        sharing: see `torchcurv.curv.options`; None: "whole" for step_rule="quadratic", else "expand".
        ema_decay: a number, or a function of the step. refresh_tol, refresh_cap, refresh_warmup, rows_limit,
            factor_blocks, max_factor_dim, max_positions, partition, rank: see `torchcurv.curv.options`.
        reduction, class_dim: of a loss given by name. output_fn: from the model's output to the loss's input.
        grad_scaler: the torch.amp.GradScaler that scales the loss, if any.
        unsupported: "error" lists parameters without a known curvature, "gradient" trains them with the gradient.
        seed: of the generator that the draws come from; the global generators stay unchanged.

    Raises:
        ValueError, TypeError: on arguments that are not allowed, saying what is.
        RuntimeError: from `step` if there are gradients whose curvature was not captured.

    Sources: Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (2015);
    Martens, "New insights and perspectives on the natural gradient method" (2020); You et al., "Large batch training
    of convolutional networks" (2017).
    """

    over_ranks: ClassVar = True
    table: ClassVar = with_defaults(
        table_of(MainLossOption, MainOptions, MainStepOptions, SecondOrderOptions),
        lr=None,
        damping=None,
        damping_scale="auto",
        sharing=None,
        update_every="auto",
        refactor_every="auto",
        max_positions=2**15,
    )

    def __init__(
        self,
        model: nn.Module,
        params: Any = None,
        *,
        loss_fn: nn.Module | str | None = "cross_entropy",
        curv_type: str | Hessian = "ggn",
        approx: str | Bundle | None = "kfac",
        lr: float | Tensor | None = None,
        momentum: float = 0.7,
        damping: float | Tensor | Callable[[int], float] | Damping | AdaptiveDamping | None = None,
        step: QuadraticModel | None = None,
        refresh: Refresh | None = None,
        **options: Unpack[SecondOrderOptions],
    ) -> None:
        named = {"loss_fn": loss_fn, "curv_type": curv_type, "approx": approx, "lr": lr, "momentum": momentum}
        given = given_options(named, damping, (step, refresh), options)
        chosen = resolved(complete(self.table, given, type(self).__name__))
        self.settings = {name: chosen[name] for name in CONTROL}
        _check_control(self.settings, chosen["grad_scaler"])
        by_lm = chosen["damping_rule"] == "lm"
        super().__init__(
            model,
            params,
            chosen,
            numbers={"damping": 'with damping_rule="lm" pass the number to start from'} if by_lm else {},
            rules=(no_price, nesterov_has_momentum, quadratic_is_plain, lm_descends_by_numbers),
            companions=(Momentum, Descent, StepControl),
            warmup=chosen["curvature_warmup"],
        )

    def run_closure(self, closure: Callable[[], Any] | None) -> Any:
        """closure: recomputes the loss and its gradients, as in torch.optim. With step_rule="quadratic" or
        damping_rule="lm" it is needed, and returns the loss, or (loss, output), without calling backward().
        """
        control = self.companion(StepControl)
        return control.evaluate(closure) if control.needs_closure else super().run_closure(closure)

    def update_parameters(self) -> None:
        """Steps along V by the step rule, and the damping of the next ones by the damping rule."""
        engine, control = self.engine, self.companion(StepControl)
        if engine.warming_up:
            return
        gradients: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            gradients.update(self._gradients(group))
        control.move(gradients, engine.precondition(gradients))

    def _gradients(self, group: dict[str, Any]) -> dict[Tensor, Tensor]:
        """What is preconditioned: the gradient with L2, its sign, and raw momentum."""
        params = [p for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        if group["maximize"]:
            grads = [-g for g in grads]
        if group["l2"]:
            grads = [g.add(p, alpha=group["l2"]) for g, p in zip(grads, params, strict=True)]
        if group["momentum_type"] == "raw":
            grads = with_momentum(self.state, group, params, grads)
        return dict(zip(params, grads, strict=True))


def resolved(options: dict[str, Any]) -> dict[str, Any]:
    """What "auto" and None stand for, where that follows from other options."""
    quadratic = options["step_rule"] == "quadratic"
    found, of_the_loss = dict(options), is_of_the_loss(options)
    if found["lr"] is None:  # it multiplies what the model has chosen
        found["lr"] = 1.0 if quadratic else 0.1 if of_the_loss else 0.3
    if found["damping_scale"] == "auto":  # a rule that changes the damping can start from one for any problem
        found["damping_scale"] = "relative" if quadratic and options["damping_rule"] == "lm" else "absolute"
    relative = found["damping_scale"] == "relative"
    if found["damping"] is None:
        found["damping"] = (0.03 if relative else 0.01) if of_the_loss else 1.0
    if found["damping_bounds"] is None:
        found["damping_bounds"] = (1e-4 if relative else 1e-8, 1e8)
    if found["sharing"] is None:  # lengths by a model want the curvature of whole gradients, others the cheaper one
        found["sharing"] = "whole" if quadratic else "expand"
    found["kl_clip"] = checked_kl_clip(found["kl_clip"], None if quadratic else 0.01)  # the model bounds its own steps
    return found


def _check_control(control: dict[str, Any], grad_scaler: Any) -> None:
    for key, allowed in (("step_rule", STEP_RULES), ("damping_rule", DAMPING_RULES)):
        if control[key] not in allowed:
            raise ValueError(f"{key}={control[key]!r}; allowed are {', '.join(map(repr, allowed))}")
        if control[key] != "fixed" and grad_scaler is not None:
            raise ValueError(f"{key}={control[key]!r} with a grad_scaler: it reads the loss as it is; scale nothing")
