"""What the options of a block have to do with one another: each rule raises, saying what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def methods_of(approx: str | None) -> tuple[str, ...]:
    """The ways to the Hessian that an approximation has, the default first."""
    known = {"diag": ("propagate", "exact", "hutchinson", "price"), "kfac": ("propagate",)}
    return known.get(approx or "", ("exact",))


# ------------------------------------------------------------------------ what options have to do with one another


def _hessian_has_a_way(options: Any) -> None:
    if options.curv_type != "hessian":
        return
    if options.approx == "ekfac":
        raise ValueError(
            'approx="ekfac" of the Hessian is not known: choose "full", "block", "unit", "kfac", "diag" or "lowrank", '
            'or curv_type="ggn"'
        )
    allowed = methods_of(options.approx)
    if options.approx is not None and options.hessian_method not in (None, *allowed):
        raise ValueError(
            f"hessian_method={options.hessian_method!r} with approx={options.approx!r}; allowed are "
            f"{', '.join(map(repr, allowed))}"
        )


def _partition_fits(options: Any) -> None:
    if options.partition not in (None, "layer") and options.approx not in ("full", "lowrank", None):
        raise ValueError(
            f'partition={options.partition!r} with approx={options.approx!r}; it is for "full" and "lowrank"; every '
            "other approximation is made layer by layer"
        )


def _input_is_kfac(options: Any) -> None:
    if options.curv_type == "input" and options.approx not in ("kfac", None):
        raise ValueError(
            f'curv_type="input" with approx={options.approx!r}: it is the A of K-FAC, known as no other '
            'approximation: write approx="kfac"'
        )


BLOCK_RULES: list[Callable[[Any], None]] = [_hessian_has_a_way, _partition_fits, _input_is_kfac]
