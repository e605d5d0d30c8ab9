"""SecondOrderOptimizer: gradient descent along (C + λ I)^-1 g."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from torchcurv.curv.curvature import OPTION_NAMES
from torchcurv.curv.kinds import INPUT
from torchcurv.curv.schedule import check_number
from torchcurv.optim.base import WHOLE_OPTIONS, CurvatureOptimizer
from torchcurv.optim.update import descend_, momentum_

STEP_OPTIONS = ("lr", "momentum", "nesterov", "momentum_type", "weight_decay", "l2", "maximize")
MOMENTUM_TYPES = ("preconditioned", "raw")


class SecondOrderOptimizer(CurvatureOptimizer):
    r"""Preconditioned gradient descent with the curvature of each layer.

    For a gradient g (maximize flips its sign, `l2` adds l2 * p to it) and the curvature C of the loss

        V = (C + (damping + l2) I)^-1 g                 approx=None: V = g
        ν = min(1, sqrt(kl_clip / Σ lr² <V, g>))        one number for all covered parameters; 1 if kl_clip is None
        m = momentum * m + ν V,  p = (1 - lr * weight_decay) p - lr * m

    For curv_type="input", whose C is not in units of the loss, V = damping (C + damping I)^-1 g and ν = 1: such a
    group tends to the plain gradient as its damping grows.

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
        lr: step size, a number or a 0-d tensor.
        momentum: 0 <= momentum < 1. nesterov: look ahead.
        momentum_type: "preconditioned" averages V, "raw" averages g before preconditioning.
        damping: λ > 0 in units of the loss's curvature. damping_type: "factored" or "exact" (through eigenvectors).
        kl_clip: bound κ on lr² <V, g>; None: no clipping.
        weight_decay: decoupled decay. l2: coefficient of l2/2 norm(p)² in the loss, in g and in the damping.
        maximize: ascend.
        samples: signals drawn per step; None: the exact curvature (one backward pass per output element).
        sharing, ema_decay, update_every, refactor_every ("adaptive" too), refresh_tol, refresh_cap, refresh_warmup,
            rows_limit, factor_blocks, max_factor_dim, partition, rank: see
            `torchcurv.curv.curvature.Options`.
        reduction, class_dim: of a loss given by name. output_fn: from the model's output to the loss's input.
        grad_scaler: the torch.amp.GradScaler that scales the loss, if any.
        unsupported: "error" lists parameters without a known curvature, "gradient" trains them with the gradient.
        seed: of the generator that the draws come from; the global generators are left alone.

    Raises:
        ValueError, TypeError: on arguments that are not allowed, saying what is.
        RuntimeError: from `step` if there are gradients whose curvature was not captured.

    Sources: Martens & Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature" (2015);
    Martens, "New insights and perspectives on the natural gradient method" (2020).
    """

    _copied: ClassVar[tuple[str, ...]] = (*CurvatureOptimizer._copied, "_kl_clip")

    def __init__(
        self,
        model: nn.Module,
        params: Any = None,
        *,
        loss_fn: nn.Module | str | None = "cross_entropy",
        curv_type: str = "ggn",
        approx: str | None = "kfac",
        lr: float | Tensor = 0.1,
        momentum: float = 0.7,
        damping: float | Tensor = 0.1,
        nesterov: bool = False,
        momentum_type: str = "preconditioned",
        weight_decay: float = 0.0,
        l2: float = 0.0,
        maximize: bool = False,
        kl_clip: float | None = 1.0,
        samples: int | None = 1,
        sharing: str = "expand",
        damping_type: str = "factored",
        ema_decay: float = 0.95,
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
        partition: str | None = None,
        rank: int = 16,
        reduction: str | None = None,
        class_dim: int | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        grad_scaler: Any = None,
        unsupported: str = "error",
        seed: int = 0,
    ) -> None:
        self._kl_clip = checked_kl_clip(kl_clip)
        given = locals()
        super().__init__(
            model,
            params,
            {name: given[name] for name in STEP_OPTIONS},
            {name: given[name] for name in OPTION_NAMES},
            **{name: given[name] for name in WHOLE_OPTIONS},
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_step_options(group)

    def _update(self) -> None:
        gradients: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            gradients.update(self._gradients(group))
        solved = self._solve(gradients)
        common = self._clip(gradients, solved)
        for group in self.param_groups:
            clip = None if group["curv_type"] == INPUT else common
            params = [p for p in group["params"] if p in gradients]
            averaged = group["momentum"] and group["momentum_type"] == "preconditioned" and not group["nesterov"]
            if averaged and clip is not None and all(p in solved for p in params):  # one pass over the steps less
                for p in params:
                    self._buffer(self.state[p], p).mul_(group["momentum"]).addcmul_(solved[p], clip)
                descend_(params, [self.state[p]["momentum_buffer"] for p in params], group["lr"], group["weight_decay"])
                continue
            steps = [solved[p] if p in solved else gradients[p] for p in params]
            if clip is not None:
                steps = [x * clip if p in solved else x for p, x in zip(params, steps, strict=True)]
            if group["momentum_type"] == "preconditioned":
                steps = self._momentum(group, params, steps)
            descend_(params, steps, group["lr"], group["weight_decay"])

    def _gradients(self, group: dict[str, Any]) -> dict[Tensor, Tensor]:
        """What is preconditioned: the gradient with L2, its sign, and raw momentum."""
        params = [p for p in group["params"] if p.grad is not None]
        grads = [p.grad for p in params]
        if group["maximize"]:
            grads = [-g for g in grads]
        if group["l2"]:
            grads = [g.add(p, alpha=group["l2"]) for g, p in zip(grads, params, strict=True)]
        if group["momentum_type"] == "raw":
            grads = self._momentum(group, params, grads)
        return dict(zip(params, grads, strict=True))

    def _momentum(self, group: dict[str, Any], params: list[Tensor], steps: list[Tensor]) -> list[Tensor]:
        if not group["momentum"]:
            return steps
        buffers = [self._buffer(self.state[p], p) for p in params]
        return momentum_(buffers, steps, group["momentum"], group["nesterov"])

    def _save_param(self, state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
        super()._save_param(state, p, group)
        if group["momentum"]:
            self._buffer(state, p)


def checked_kl_clip(kl_clip: float | None) -> float | None:
    if kl_clip is not None:
        check_number("kl_clip", kl_clip, lambda x: x > 0, "a number > 0, or None for no clipping")
    return kl_clip


def check_step_options(options: dict[str, Any]) -> None:
    """Raise on step options that are not allowed, saying what is."""
    lr = options["lr"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr is a tensor of shape {tuple(lr.shape)}; pass a number >= 0, or a 0-d tensor")
    else:
        check_number("lr", lr, lambda x: 0 <= x < math.inf, "a finite number >= 0, or a 0-d tensor")
    for key in ("weight_decay", "l2"):
        check_number(key, options[key], lambda x: 0 <= x < math.inf, "a finite number >= 0")
    check_number("momentum", options["momentum"], lambda x: 0 <= x < 1, "a number with 0 <= momentum < 1")
    for key in ("nesterov", "maximize"):
        if not isinstance(options[key], bool):
            raise TypeError(f"{key}={options[key]!r}; pass True or False")
    if options["nesterov"] and not options["momentum"]:
        raise ValueError("nesterov=True needs momentum > 0")
    if options["momentum_type"] not in MOMENTUM_TYPES:
        allowed = ", ".join(map(repr, MOMENTUM_TYPES))
        raise ValueError(f"momentum_type={options['momentum_type']!r}; allowed are {allowed}")
