"""What the options of a block have to do with one another: each rule raises, saying what to write instead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _hessian_has_a_way(options: Any) -> None:
    if options.curv_type != "hessian" or options.approx is None:
        return
    allowed = options.hessian_methods
    if not allowed:
        raise ValueError(
            f'approx="{options.approx}" of the Hessian is not known: choose "full", "block", "unit", "kfac", "diag" or '
            '"lowrank", or curv_type="ggn"'
        )
    if options.hessian_method not in (None, *allowed):
        raise ValueError(
            f"hessian_method={options.hessian_method!r} with approx={options.approx!r}; allowed are "
            f"{', '.join(map(repr, allowed))}"
        )


def _hessian_is_propagated(options: Any) -> None:
    """Options that nothing but propagation reads, and those that only its matrices do."""
    if options.curv_type != "hessian" or options.approx is None:
        return
    if options.residual != "keep" and options.method != "propagate":
        raise ValueError(
            f'residual={options.residual!r} with a Hessian that is not propagated: choose approx="diag" or "kfac" '
            'with hessian_method=None, or curv_type="ggn" for residual="zero"'
        )
    for name in ("residual_over", "hessian_averaging"):
        if vars(options)[name] != "sample" and (options.approx, options.method) != ("kfac", "propagate"):
            raise ValueError(
                f'{name}={vars(options)[name]!r} with approx={options.approx!r}; only the matrices of "kfac" are '
                f'means over a batch: choose approx="kfac", or {name}="sample"'
            )


def _partition_fits(options: Any) -> None:
    if options.partition not in (None, "layer") and options.approx is not None and not options.joins:
        raise ValueError(
            f'partition={options.partition!r} with approx={options.approx!r}; it is for "full" and "lowrank"; every '
            "other approximation is made layer by layer"
        )


def _kind_is_known_as(options: Any) -> None:
    allowed = options.kind.approximations
    if allowed is not None and options.approx not in (None, *allowed):
        choices = " or ".join(f'approx="{name}"' for name in allowed)
        raise ValueError(
            f'curv_type="{options.curv_type}" with approx={options.approx!r}: it is known as no other approximation: '
            f"write {choices}"
        )


BLOCK_RULES: list[Callable[[Any], None]] = [
    _hessian_has_a_way,
    _hessian_is_propagated,
    _partition_fits,
    _kind_is_known_as,
]
