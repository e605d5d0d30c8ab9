"""Preconditioner: (C + λ I)^-1 g in front of any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Unpack

from torch import Tensor, nn

from torchcurv.curv.bundles import Bundle, Damping, Hessian, Refresh, given_options
from torchcurv.curv.options import MainOptions, complete, table_of, with_defaults
from torchcurv.optim.base import CurvatureOptimizer
from torchcurv.optim.options import MainLossOption, PreconditionerOptions
from torchcurv.optim.rules import no_price


class Preconditioner(CurvatureOptimizer):
    """Replaces `.grad` by (C + damping I)^-1 `.grad`, for another optimizer to use.

        precond = Preconditioner(model, approx="kfac", damping=1e-3)
        loss.backward(); precond.step(); adamw.step()

    For curv_type="input" it is damping (C + damping I)^-1 `.grad`, which leaves the gradient of a bias as it is.

    The arguments are those of SecondOrderOptimizer that do not concern the update. The groups have no lr: a learning
    rate belongs to the optimizer behind. `state_dict` and `load_state_dict` resume the running averages.
    """

    over_ranks: ClassVar = True
    table: ClassVar = with_defaults(table_of(MainLossOption, MainOptions, PreconditionerOptions), max_positions=2**15)

    def __init__(
        self,
        model: nn.Module,
        params: Any = None,
        *,
        loss_fn: nn.Module | str | None = "cross_entropy",
        curv_type: str | Hessian = "ggn",
        approx: str | Bundle | None = "kfac",
        damping: float | Tensor | Callable[[int], float] | Damping = 0.1,
        refresh: Refresh | None = None,
        **options: Unpack[PreconditionerOptions],
    ) -> None:
        named = {"loss_fn": loss_fn, "curv_type": curv_type, "approx": approx}
        given = given_options(named, damping, (refresh,), options)
        super().__init__(model, params, complete(self.table, given, type(self).__name__), rules=(no_price,))

    def run_closure(self, closure: Callable[[], Any] | None) -> None:
        """None: there is no closure to be run."""
        if closure is not None:
            raise ValueError("Preconditioner.step takes no closure: give it to the optimizer behind")

    def update_parameters(self) -> None:
        """Precondition the gradients in place."""
        gradients = {p: p.grad for p in self.engine.params() if p.grad is not None}
        for p, x in self.engine.precondition(gradients).items():
            gradients[p].copy_(x)
