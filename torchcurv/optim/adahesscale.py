"""AdaHesScale: Adam whose second moment is that of the diagonal of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor, nn

from torchcurv.curv.checks import Interval, check_number, number
from torchcurv.curv.options import (
    LIVE,
    BlockOptions,
    MainOptions,
    Option,
    Options,
    complete,
    table_of,
    with_defaults,
)
from torchcurv.optim.base import CurvatureOptimizer
from torchcurv.optim.engine.companion import Companion, Group, buffer_of
from torchcurv.optim.options import LossOptions, MainLossOption
from torchcurv.optim.update import scale_within

_finite = number(lambda x: 0 <= x < math.inf, "a finite number >= 0")


def _betas(name: str, value: Any) -> None:
    for beta in value:
        check_number(name, beta, lambda x: 0 <= x < 1, "two numbers from 0 to below 1")


class AdamOptions(TypedDict, total=False):
    """Those of Adam, per group."""

    lr: Annotated[float, Option(1e-5, _finite, LIVE, "step size")]
    betas: Annotated[tuple[float, float], Option((0.9, 0.999), _betas, LIVE, "decays of the two moments")]
    eps: Annotated[float, Option(1e-8, _finite, LIVE, "added to the root of the second moment")]


def _is_diagonal(group: Group, options: Options, settings: Mapping[str, Any]) -> None:
    if options.approx not in ("diag", None):
        raise ValueError(f'approx={options.approx!r}; AdaHesScale reads a diagonal: "diag", or None for Adam')


class AdaHesScale(CurvatureOptimizer):
    r"""Adam with the propagated diagonal h of the Hessian (HesScale) in place of the gradient's square root.

        m = β1 m + (1 - β1) g,  v = β2 v + (1 - β2) h²,  u = (m / (1 - β1^t)) / (sqrt(v / (1 - β2^t)) + eps)
        p <- p - lr s u,        s = min(max_scale, sqrt(2 delta / Σ |h| u²))    one number for all; 1 if delta is None

    The sum is the second-order term of the change of the loss, which the trust region keeps below delta. Parameters in
    groups with approx=None have h = g: they are trained by Adam.

    Args:
        residual: "keep" is HesScale, "zero" HesScaleGN; see `torchcurv.curv.options`.
        delta: size of the trust region in units of the loss, or None. max_scale: bound on s.
        update_every: steps between two measurements of h.

    The others are those of SecondOrderOptimizer and of torch.optim.Adam.

    Sources: Elsayed and Mahmood, "HesScale" (2210.11639); Elsayed et al., "Revisiting scalable Hessian diagonal
    approximations for applications in reinforcement learning" (2406.03276).
    """

    over_ranks: ClassVar = True
    table: ClassVar = with_defaults(
        table_of(MainLossOption, MainOptions, BlockOptions, LossOptions, AdamOptions),
        curv_type="hessian",
        approx="diag",
        hessian_method="propagate",
        ema_decay=0.0,
    )

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
        **options: Unpack[LossOptions],
    ) -> None:
        if delta is not None:
            check_number("delta", delta, lambda x: x > 0, "a number > 0, or None for no trust region")
        check_number("max_scale", max_scale, lambda x: x > 0, "a number > 0")
        self.settings = {"delta": delta, "max_scale": max_scale}
        named = {"loss_fn": loss_fn, "lr": lr, "betas": betas, "eps": eps, "residual": residual}
        given = {**named, "update_every": update_every, "approx": approx, **options}
        super().__init__(
            model,
            params,
            complete(self.table, given, type(self).__name__),
            rules=(_is_diagonal,),
            companions=(Moments,),
            factors=False,
        )

    def update_parameters(self) -> None:
        """Adam with the diagonals that were measured."""
        diagonals = self._diagonals()
        steps: dict[Tensor, Tensor] = {}
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad.to(torch.promote_types(p.dtype, torch.float32))
                h, state = diagonals.get(p, g), moments_of(self.state[p], p)
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
        for block in self.engine.blocks:
            if block.average:
                values = block.tensors["diag"].reshape(block.layers[0].shape)
                found.update(zip(block.params, block.layers[0].split(values), strict=True))
        return found

    def _scale(self, steps: dict[Tensor, Tensor], diagonals: dict[Tensor, Tensor]) -> Tensor | float:
        """s of the trust region, without a host sync."""
        own = [(diagonals[p].abs() * u.square()).sum() for p, u in steps.items() if p in diagonals]
        if self.settings["delta"] is None or not own:
            return 1.0
        return scale_within(torch.stack(own).sum(), 2 * self.settings["delta"], self.settings["max_scale"])


class Moments(Companion):
    """The moments of Adam, of every parameter."""

    def save(self, state: dict[str, Any], p: Tensor, group: Group) -> None:
        moments_of(state, p)


def moments_of(state: dict[str, Any], p: Tensor) -> dict[str, Any]:
    for name in ("exp_avg", "exp_avg_sq"):
        buffer_of(state, p, name)
    state.setdefault("moment_steps", 0)
    return state
