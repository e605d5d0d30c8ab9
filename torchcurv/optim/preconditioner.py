"""Preconditioner: (C + λ I)^-1 g in front of any torch optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from torchcurv.curv.options import OPTION_NAMES
from torchcurv.optim.base import WHOLE_OPTIONS, CurvatureOptimizer


class Preconditioner(CurvatureOptimizer):
    """Replaces `.grad` by (C + damping I)^-1 `.grad`, for another optimizer to use.

        precond = Preconditioner(model, approx="kfac", damping=1e-3)
        loss.backward(); precond.step(); adamw.step()

    For curv_type="input" it is damping (C + damping I)^-1 `.grad`, which leaves the gradient of a bias as it is.

    The arguments are those of SecondOrderOptimizer that do not concern the update. The groups have no lr: a learning
    rate belongs to the optimizer behind. `state_dict` and `load_state_dict` resume the running averages.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Any = None,
        *,
        loss_fn: nn.Module | str | None = "cross_entropy",
        curv_type: str = "ggn",
        approx: str | None = "kfac",
        damping: float | Tensor = 0.1,
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
        max_positions: int | None = 2**15,
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
        super().__init__(
            model,
            params,
            {},
            {name: given[name] for name in OPTION_NAMES},
            **{name: given[name] for name in WHOLE_OPTIONS},
        )

    def run_closure(self, closure: Callable[[], Any] | None) -> None:
        """None: there is no closure to be run."""
        if closure is not None:
            raise ValueError("Preconditioner.step takes no closure: give it to the optimizer behind")

    def update_parameters(self) -> None:
        """Precondition the gradients in place."""
        gradients = {p: p.grad for p in self.engine.params() if p.grad is not None}
        for p, x in self.engine.precondition(gradients).items():
            gradients[p].copy_(x)
