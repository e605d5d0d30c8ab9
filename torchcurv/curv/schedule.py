"""Schedules: when a block's statistics are measured and when its factor is computed anew; checks of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

ADAPTIVE, AUTO = "adaptive", "auto"
Interval = int | str | Callable[[int], int]


@dataclass
class Pace:
    """How often one statistic is measured: ever more rarely while its running average X stands still.

    With d_t = norm(X_t - X_t-1) / norm(X_t-1) (Frobenius) at the t-th measurement and i_t the steps before it,

        d_t >= tol                      i_t+1 = max(1, i_t // 2)
        d_t < tol <= d_t + d_t-1        i_t+1 = i_t
        d_t + d_t-1 < tol               i_t+1 = i_t + i_t-1, up to a cap

    The sum bounds the distance to the average before the last. Source: Osawa et al., "Scalable and practical natural
    gradient for large-scale deep learning" (2020), of single measurements; with running averages, noise that the
    average takes out does not count as a change.

    next: the step at which it is due.
    """

    next: int = 0
    interval: int = 1
    before: int = 1
    change: float = math.inf

    def decide(self, step: int, change: float, tol: float, cap: int, warmup: int) -> None:
        """It was measured at a step and moved by `change`; after one that is not finite it is measured at once."""
        interval = self.interval
        if not math.isfinite(change) or step < warmup:
            interval = 1
        elif change >= tol:
            interval = max(1, interval // 2)
        elif change + self.change < tol:
            interval = min(cap, interval + self.before)
        self.before, self.interval = self.interval, interval
        self.next, self.change = step + interval, change

    def state(self) -> dict[str, int | float]:
        return dict(vars(self))


def check_interval(name: str, value: Interval) -> Interval:
    if callable(value) or value == ADAPTIVE:
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(
            f'{name}={value!r}; pass an int of at least 1, "adaptive", or a callable from the step to such an int'
        )
    return value


def interval_at(name: str, value: Callable[[int], int], step: int) -> int:
    """The interval that holds from this step on."""
    answer = value(step)
    if isinstance(answer, bool) or not isinstance(answer, int) or answer < 1:
        raise ValueError(f"{name} returned {answer!r} at step {step}; it must return an int of at least 1")
    return answer


def value_at(name: str, value: Callable[[int], float], step: int) -> float:
    """The number that a function of the step says."""
    answer = value(step)
    if isinstance(answer, bool) or not isinstance(answer, int | float) or not math.isfinite(answer) or answer < 0:
        raise ValueError(f"{name} returned {answer!r} at step {step}; it must return a finite number >= 0")
    return float(answer)


def check_number(name: str, value: Any, fits: Callable[[float], bool], allowed: str) -> None:
    """Raise unless value is a number, and no bool, that fits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass {allowed}")
    if not fits(value):
        raise ValueError(f"{name}={value!r}; pass {allowed}")
