"""AdaHesScale: Adam whose second moment is that of the diagonal of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from torchcurv.curv.checks import Interval, check_number
from torchcurv.curv.options import OPTION_NAMES, Options
from torchcurv.optim.base import WHOLE_OPTIONS, CurvatureOptimizer
from torchcurv.optim.update import scale_within


class AdaHesScale(CurvatureOptimizer):
    r"""Adam with the propagated diagonal h of the Hessian (HesScale) in place of the gradient's square root.

        m = β1 m + (1 - β1) g,  v = β2 v + (1 - β2) h²,  u = (m / (1 - β1^t)) / (sqrt(v / (1 - β2^t)) + eps)
        p <- p - lr s u,        s = min(max_scale, sqrt(2 delta / Σ |h| u²))    one number for all; 1 if delta is None

    The sum is the second-order term of the change of the loss, which the trust region keeps below delta. Parameters in
    groups with approx=None have h = g: they are trained by Adam.

    Args:
        residual: "keep" is HesScale, "zero" HesScaleGN; see `torchcurv.curv.options.Options`.
        delta: size of the trust region in units of the loss, or None. max_scale: bound on s.
        update_every: steps between two measurements of h.

    The others are those of SecondOrderOptimizer and of torch.optim.Adam.

    Sources: Elsayed and Mahmood, "HesScale" (2210.11639); Elsayed et al., "Revisiting scalable Hessian diagonal
    approximations for applications in reinforcement learning" (2406.03276).
    """

    _factors: ClassVar[bool] = False
    _copied: ClassVar[tuple[str, ...]] = (*CurvatureOptimizer._copied, "_delta", "_max_scale")

    def __init__(
        self,
        model: nn.Module,
        params: Any = None,
        *,
        loss_fn: nn.Module | str | None = "cross_entropy",
        lr: float = 1e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        residual: str = "keep",
        delta: float | None = None,
        max_scale: float = 1.0,
        update_every: Interval = 1,
        approx: str | None = "diag",
        reduction: str | None = None,
        class_dim: int | None = None,
        output_fn: Callable[[Any], Tensor] | None = None,
        grad_scaler: Any = None,
        unsupported: str = "error",
        seed: int = 0,
    ) -> None:
        if delta is not None:
            check_number("delta", delta, lambda x: x > 0, "a number > 0, or None for no trust region")
        check_number("max_scale", max_scale, lambda x: x > 0, "a number > 0")
        self._delta, self._max_scale = delta, max_scale
        if approx not in ("diag", None):
            raise ValueError(f'approx={approx!r}; AdaHesScale reads a diagonal: "diag", or None for Adam')
        options = Options(
            curv_type="hessian",
            approx=approx,
            hessian_method="propagate",
            residual=residual,
            ema_decay=0.0,
            update_every=update_every,
        )
        given = locals()
        super().__init__(
            model,
            params,
            {"lr": lr, "betas": betas, "eps": eps},
            {name: getattr(options, name) for name in OPTION_NAMES},
            **{name: given[name] for name in WHOLE_OPTIONS},
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        for key in ("lr", "eps"):
            check_number(key, group[key], lambda x: 0 <= x < math.inf, "a finite number >= 0")
        for beta in group["betas"]:
            check_number("betas", beta, lambda x: 0 <= x < 1, "two numbers from 0 to below 1")
        if group["approx"] not in ("diag", None):
            raise ValueError(f'approx={group["approx"]!r}; AdaHesScale reads a diagonal: "diag", or None for Adam')

    def _update(self) -> None:
        diagonals = self._diagonals()
        steps: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad.to(torch.promote_types(p.dtype, torch.float32))
                h, state = diagonals.get(p, g), self._moments(self.state[p], p)
                state["moment_steps"] += 1
                t = state["moment_steps"]
                m, v = state["exp_avg"].lerp_(g, 1 - beta1), state["exp_avg_sq"].mul_(beta2)
                v.addcmul_(h, h, value=1 - beta2)
                steps[p] = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + group["eps"])
        scale = self._scale(steps, diagonals)
        for group in self.param_groups:
            for p in group["params"]:
                if p in steps:
                    p.sub_((steps[p] * (scale * group["lr"])).to(p.dtype))

    def _diagonals(self) -> dict[Tensor, Tensor]:
        """What was last measured of the Hessian's diagonal, by parameter."""
        found: dict[Tensor, Tensor] = {}
        for block in self._blocks:
            if block.measured:
                values = block.tensors["diag"].reshape(block.layers[0].shape)
                found.update(zip(block.params, block.layers[0].split(values), strict=True))
        return found

    def _scale(self, steps: dict[Tensor, Tensor], diagonals: dict[Tensor, Tensor]) -> Tensor | float:
        """s of the trust region, without a host sync."""
        own = [(diagonals[p].abs() * u.square()).sum() for p, u in steps.items() if p in diagonals]
        if self._delta is None or not own:
            return 1.0
        return scale_within(torch.stack(own).sum(), 2 * self._delta, self._max_scale)

    def _moments(self, state: dict[str, Any], p: Tensor) -> dict[str, Any]:
        if "exp_avg" not in state:
            dtype = torch.promote_types(p.dtype, torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=dtype) for _ in range(2))
            state["moment_steps"] = 0
        return state

    def _save_param(self, state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
        super()._save_param(state, p, group)
        self._moments(state, p)
