"""Schedules: when a block's statistics are measured and when its factor is computed anew."""

from __future__ import annotations

from collections.abc import Callable

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
