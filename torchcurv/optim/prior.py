"""The prior and the likelihood of VIOptimizer: temperature, precision, and how many outputs a sample has.

Options of the optimizer are in its `settings`, those of a group in the group; δ̃ = τ δ / N.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.capture.hooks import Hook
from torchcurv.curv.checks import check_number
from torchcurv.curv.losses.table import loss_of
from torchcurv.optim.engine.building import Names
from torchcurv.optim.engine.companion import Companion, Group
from torchcurv.optim.engine.damping import is_zero

Settings = Mapping[str, Any]
POSTERIOR_OPTIONS = ("prior_precision", "temperature", "init_precision")  # per group
_HOLD_DAMPING = ("kfac", "unit", "block", "full")  # shapes whose "factored" factor has its damping inside


def temperature_at(settings: Settings, group: Group, step: int) -> float:
    """τ of a group at a step."""
    warmup = settings["kl_warmup"]
    return group["temperature"] * (1.0 if warmup is None else warmed(warmup, step))


def prior_damping(settings: Settings, group: Group, step: int) -> float:
    """δ̃, 0 where there is no prior."""
    delta = group["prior_precision"]
    return 0.0 if delta is None else temperature_at(settings, group, step) * delta / settings["dataset_size"]


def needs_draw_factor(group: Group) -> bool:
    """Whether one inverse cannot have the damping of the step and that of the draws."""
    held = group["damping_type"] == "factored" and group["approx"] in _HOLD_DAMPING and group["curv_type"] != "hessian"
    return held and group["prior_precision"] is not None and not is_zero(group["damping"])


def check_posterior_block(block: Curvature, index: int, groups: Sequence[Group], names: Names) -> None:
    """One posterior over a block."""
    group_of, one = {p: group for group in groups for p in group["params"]}, groups[index]
    for p in block.params:
        for key in POSTERIOR_OPTIONS:
            if one[key] != group_of[p][key]:
                raise ValueError(
                    f"the parameters {names[block.params[0]]} and {names[p]} belong to one block but have "
                    f"{key}={one[key]!r} and {key}={group_of[p][key]!r}: these must agree within a layer, and between "
                    'all layers of approx="full"'
                )
    if block.approx.of_one_step and one["prior_precision"] is not None:
        raise ValueError(
            f"block {block.name!r} has {block.size} parameters, more than rows_limit={block.options.rows_limit}, and "
            "rows do not outlive a step, as a posterior must: raise rows_limit, or choose another approx"
        )


class OutputMeter(Companion):
    """With `noise_variance`, how many elements a sample of the output has: in settings["outputs"]."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer)
        seen = optimizer.settings["outputs"] = dict(optimizer.settings["outputs"])
        self._detach: Callable[[], object] = lambda: None
        if optimizer.settings["noise_variance"] is not None:
            # the hook knows neither the optimizer nor this, so that these are freed while the model lives
            hook = Hook(partial(_note_outputs, seen, optimizer.engine.recording["output_fn"]))
            self._detach = weakref.finalize(self, optimizer.model.register_forward_hook(hook).remove)

    def removed(self) -> None:
        self._detach()


def _note_outputs(
    seen: dict[str, int], output_fn: Callable[[Any], Any] | None, module: nn.Module, args: Any, output: Any
) -> None:
    f = output if output_fn is None else output_fn(output)
    if isinstance(f, Tensor) and f.dim() and len(f):
        seen["size"] = f.numel() // len(f)


# ---------------------------------------------------------------------------------------------- checks


def check_positive(name: str, value: Any, allowed: str) -> None:
    check_number(name, value, lambda x: 0 < x < math.inf, allowed)


def checked_noise(noise_variance: float | None, loss_fn: nn.Module | str | None) -> float | None:
    if noise_variance is None:
        return None
    check_positive("noise_variance", noise_variance, "a number > 0, or None")
    if loss_fn is None or not loss_of(loss_fn).formula.gaussian:
        raise ValueError(
            f"noise_variance is that of a Gaussian likelihood, and loss_fn={loss_fn!r} is none: pass 'mse' or "
            "nn.MSELoss(), or noise_variance=None"
        )
    return float(noise_variance)


def checked_warmup(warmup: int | Callable[[int], float] | None) -> int | Callable[[int], float] | None:
    number = isinstance(warmup, int) and not isinstance(warmup, bool) and warmup >= 1
    if not (warmup is None or callable(warmup) or number):
        raise ValueError(
            f"kl_warmup={warmup!r}; pass a number of steps, an int of at least 1, or a function of the step to what "
            "the temperature is multiplied by, or None"
        )
    if warmup is not None:
        warmed(warmup, 0)  # raises on what is no number > 0
    return warmup


def warmed(warmup: int | Callable[[int], float], step: int) -> float:
    if not callable(warmup):
        return min(1.0, (step + 1) / warmup)
    factor = warmup(step)
    check_positive(f"the value of kl_warmup at step {step}", factor, "a number > 0 from it")
    return factor
