"""Schedules: when a block's statistics are measured and when its factor is computed anew; checks of numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Interval = int | Callable[[int], int]


def check_interval(name: str, value: Interval) -> Interval:
    if callable(value):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r}; pass an int of at least 1, or a callable from the step to such an int")
    return value


def interval_at(name: str, value: Interval, step: int) -> int:
    """The interval that holds from this step on."""
    if not callable(value):
        return value
    answer = value(step)
    if isinstance(answer, bool) or not isinstance(answer, int) or answer < 1:
        raise ValueError(f"{name} returned {answer!r} at step {step}; it must return an int of at least 1")
    return answer


def check_number(name: str, value: Any, fits: Callable[[float], bool], allowed: str) -> None:
    """Raise unless value is a number, and no bool, that fits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; pass {allowed}")
    if not fits(value):
        raise ValueError(f"{name}={value!r}; pass {allowed}")
