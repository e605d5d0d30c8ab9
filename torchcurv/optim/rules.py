"""What options of a parameter group have to do with one another: each rule raises, saying what to write instead."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from torchcurv.curv.checks import check_number
from torchcurv.curv.options import Options
from torchcurv.optim.engine.damping import Group, is_of_the_loss, is_zero

Settings = Mapping[str, Any]


def damped(group: Group, options: Options, settings: Settings) -> None:
    """Something > 0 is added to the curvature."""
    shifted = not is_zero(group["damping"]) or (bool(group.get("l2")) and is_of_the_loss(group))
    if options.approx is not None and not shifted and group.get("prior_precision") is None:
        raise ValueError(
            "damping=0; pass a number > 0: curvature is singular as soon as a layer has more parameters than there are "
            "samples"
        )


def indefinite_is_mapped(group: Group, options: Options, settings: Settings) -> None:
    if options.approx is not None and options.curv_type == "hessian" and options.indefinite == "keep":
        raise ValueError(
            'indefinite="keep" leaves negative eigenvalues to be looked at (torchcurv.curvature); a step needs "abs", '
            '"clip" or "shift"'
        )


def _is_priced(options: Options) -> bool:
    return options.approx is not None and options.curv_type == "hessian" and options.method == "price"


def no_price(group: Group, options: Options, settings: Settings) -> None:
    if _is_priced(options):
        raise ValueError(
            'hessian_method="price" is an estimate over draws of a posterior, and needs VIOptimizer; others take '
            '"propagate", "exact" or "hutchinson"'
        )


# -------------------------------------------------------------------------------------- SecondOrderOptimizer


def nesterov_has_momentum(group: Group, options: Options, settings: Settings) -> None:
    if group["nesterov"] and not group["momentum"]:
        raise ValueError("nesterov=True needs momentum > 0")


def quadratic_is_plain(group: Group, options: Options, settings: Settings) -> None:
    plain = {"nesterov": False, "maximize": False, "trust_ratio": False, "momentum_type": "preconditioned"}
    for key, value in plain.items():
        if group[key] != value and settings["step_rule"] == "quadratic":
            raise ValueError(f'{key}={group[key]!r} with step_rule="quadratic", which makes the step its own way')


def lm_descends_by_numbers(group: Group, options: Options, settings: Settings) -> None:
    if settings["damping_rule"] != "lm":
        return
    if group["maximize"]:
        raise ValueError('maximize=True with damping_rule="lm": it trusts a model of a loss that falls')
    if isinstance(group["damping"], Tensor):
        raise TypeError('damping is a tensor; damping_rule="lm" changes a number')


# ----------------------------------------------------------------------------------------------- VIOptimizer


def sums_are_counted(group: Group, options: Options, settings: Settings) -> None:
    """The terms of a loss that is a sum are counted where its curvature is measured."""
    if settings["summed"] and group["approx"] is not None and group["update_every"] != 1:
        raise ValueError(
            f"update_every={group['update_every']!r} with a loss that is a sum: its terms are counted where its "
            "curvature is measured. Pass update_every=1, or reduce the loss by its mean"
        )


def price_starts_positive(group: Group, options: Options, settings: Settings) -> None:
    if not _is_priced(options):
        return
    delta, start = group["prior_precision"], group["init_precision"]
    if delta is None:
        raise ValueError('hessian_method="price" needs draws: pass a prior_precision, a number > 0')
    if start is None or start <= delta:
        raise ValueError(
            f'init_precision={start!r}; hessian_method="price" starts from a curvature > 0: pass a number greater than '
            f"prior_precision={delta!r}, such as dataset_size times the curvature of the mean loss to expect"
        )
    if settings["summed"]:
        raise ValueError(
            'hessian_method="price" makes no pass in which the terms of a sum could be counted: reduce the loss by its '
            "mean"
        )


# ------------------------------------------------------------------------------------------------- the others


def finite(*names: str) -> Any:
    """Some options are finite numbers >= 0."""

    def rule(group: Group, options: Options, settings: Settings) -> None:
        for name in names:
            check_number(name, group[name], lambda x: 0 <= x < math.inf, "a finite number >= 0")

    return rule
