"""Precisions and variances that a posterior is given: checks, and one for each block."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from torchcurv.curv.losses.loss import Loss
from torchcurv.curv.posterior.gaussian import Number

Precision = float | Tensor | dict[str, Any]  # of the prior: one, [blocks], or by the name of a block
POSITIVE = "a number > 0"


def as_number(value: Number) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else value


def check_positive(name: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number or (isinstance(value, Tensor) and value.dim() == 0)):
        came = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise TypeError(f"{name} is {came}; pass {POSITIVE}")
    if not 0 < as_number(value) < math.inf:
        raise ValueError(f"{name}={as_number(value)!r}; pass {POSITIVE}")


def precisions_of(value: Precision, blocks: list[str]) -> list[Number]:
    """δ of each block."""
    count = len(blocks)
    if isinstance(value, dict):
        if value.keys() != set(blocks):
            raise ValueError(f"prior_precision has the names {list(value)}; pass one for each of {blocks}")
        found = [value[name] for name in blocks]
    elif isinstance(value, Tensor) and value.dim():
        if value.shape != (count,):
            raise ValueError(
                f"prior_precision is a tensor of shape {tuple(value.shape)}; pass a number, or one for each of the "
                f"{count} blocks {blocks}"
            )
        found = list(value.unbind())
    else:
        found = [value] * count
    for one in found:
        check_positive("prior_precision", one)
    return found


def checked_noise(value: float | None, loss: Loss, given: Any) -> float | None:
    if loss.formula.gaussian:
        value = 1.0 if value is None else value
        check_positive("noise_variance", value)
        return float(value)
    if value is not None:
        raise ValueError(
            f"noise_variance is that of a Gaussian likelihood, and loss_fn={given!r} is none: pass 'mse' or "
            "nn.MSELoss(), or noise_variance=None"
        )
    return None
