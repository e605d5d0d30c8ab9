"""Checks of arguments: each raises with what came, what is allowed and what to write instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor


def entry_of(name: str, value: Any, known: Mapping[str, Any]) -> Any:
    """What `known` has under a value, or an error that says what it could be."""
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; allowed are {', '.join(map(repr, known))}")
    return known[value]


def check_count(name: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}; pass an int of at least {least}")
    return value


def pair_of(batch: Any) -> tuple[Any, Tensor]:
    """(x, y) of a batch of data."""
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        x, y = batch
        return x, y
    if isinstance(batch, Mapping):
        came = f"a {type(batch).__name__} with the keys {', '.join(map(repr, batch))}"
    elif isinstance(batch, tuple | list):
        came = f"a {type(batch).__name__} of {', '.join(type(part).__name__ for part in batch)}"
    else:
        came = f"a {type(batch).__name__}"
    raise TypeError(
        f"data gave {came} as a batch; a batch is a pair (x, y): x a tensor, a tuple of positional or a dict of "
        "keyword arguments of the model, and y a tensor, the target. Pass for example [((u, v), y) for u, v, y in "
        "loader], or [({k: b[k] for k in ('input_ids', 'attention_mask')}, b['labels']) for b in loader]"
    )


ADAPTIVE, AUTO = "adaptive", "auto"
Interval = int | str | Callable[[int], int]


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


# ------------------------------------------------------------------- checks of options, by name and value

Check = Callable[[str, Any], None]


def one_of(*allowed: Any) -> Check:
    return lambda name, value: check_one_of(name, value, allowed)


def check_one_of(name: str, value: Any, allowed: Collection[Any]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; allowed are {', '.join(map(repr, allowed))}")


def number(fits: Callable[[float], bool], allowed: str) -> Check:
    return lambda name, value: check_number(name, value, fits, allowed)


def count(none: str = "") -> Check:
    """An int of at least 1; none: what None means, if it is allowed."""
    other = f", or None for {none}" if none else ""

    def check(name: str, value: Any) -> None:
        if value is None and none:
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}; pass an int of at least 1{other}")

    return check


def flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}={value!r}; pass True or False")


def anything(name: str, value: Any) -> None:
    """Checked where it is used."""


# ------------------------------------------------------------------------------------- names of tables

NAMES: dict[str, Any] = {}  # by option, the tables or the names that higher floors have


def allow(option: str, names: Collection[Any]) -> None:
    """Let an option take the names of a table, also those that are added to it later."""
    NAMES[option] = names


def of_table(*others: Any) -> Check:
    """A name of the table that was given to `allow`, or one of some other values."""

    def check(name: str, value: Any) -> None:
        check_one_of(name, value, (*NAMES[name], *others))

    return check
