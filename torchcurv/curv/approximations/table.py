"""The table of approximations: from options and layers to the entry of a name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from torchcurv.curv.approximations.base import Approximation
from torchcurv.curv.approximations.dense import Dense
from torchcurv.curv.approximations.diagonal import Diagonal
from torchcurv.curv.approximations.input_covariance import InputCurvature
from torchcurv.curv.approximations.kronecker import Kronecker, Sides
from torchcurv.curv.approximations.low_rank import LowRank
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.options import HESSIAN, INPUT_COVARIANCE, Options, allow

APPROXIMATIONS: dict[str, Callable[[Options, list[Layer]], Approximation]] = {
    "full": lambda options, layers: Dense(spectrum=spectrum_rule(options)),
    "block": lambda options, layers: Dense(spectrum=spectrum_rule(options)),
    "unit": lambda options, layers: Dense(True, _wide(options, layers[0]), spectrum_rule(options)),
    "kfac": lambda options, layers: _kfac(options, layers[0]),
    "ekfac": lambda options, layers: _kronecker(options, layers[0], corrected=True),
    "diag": lambda options, layers: Diagonal(spectrum_rule(options)),
    "lowrank": lambda options, layers: LowRank(min(options.rank, _size(layers)), spectrum_rule(options)),
}


allow("approx", APPROXIMATIONS)


def register_approximation(name: str, entry: Callable[[Options, list[Layer]], Approximation]) -> None:
    """Let `approx=name` mean an approximation of your own.

    entry: from the options of a block and its layers to a subclass of torchcurv.curv.approximations.base.Approximation.
    """
    if not callable(entry):
        raise TypeError(f"register_approximation: got {entry!r}; pass a function from (options, layers)")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"register_approximation: name={name!r}; pass a name such as 'diag_kfac'")
    if name in APPROXIMATIONS:
        raise ValueError(f"register_approximation: the name {name!r} is taken: choose another one")
    APPROXIMATIONS[name] = entry


def _size(layers: list[Layer]) -> int:
    return sum(torch.Size(layer.shape).numel() for layer in layers)


def spectrum_rule(options: Options) -> str | None:
    if options.curv_type != HESSIAN:
        return None
    return "keep" if options.method == "price" else options.indefinite  # whose average stays above minus the damping


def _wide(options: Options, layer: Layer) -> bool:
    return options.max_factor_dim is not None and layer.dim > options.max_factor_dim


def _sides(options: Options, layer: Layer) -> Sides:
    return Sides.of(layer, options.factor_blocks, options.max_factor_dim)


def _shared(options: Options, layer: Layer) -> str:
    """How positions count. The gradient of a sample is not known without signals, where several uses of a weight are
    kept apart, and of tokens, where it is large.
    """
    apart = len({s.reading for s in layer.sites}) > 1
    unknown = (
        options.curv_type in (HESSIAN, INPUT_COVARIANCE)
        or apart
        or any(s.transposed or s.view.tokens for s in layer.sites)
    )
    return "expand" if options.sharing == "whole" and unknown else options.sharing


def _kronecker(options: Options, layer: Layer, corrected: bool = False) -> Kronecker:
    return Kronecker(_shared(options, layer), corrected, _sides(options, layer), spectrum_rule(options))


def _kfac(options: Options, layer: Layer) -> Approximation:
    if options.curv_type != INPUT_COVARIANCE:
        return _kronecker(options, layer)
    each_step = options.ema_decay == 0 and options.update_every == 1 and options.refactor_every == 1
    by_rows = each_step and options.damping_type == "factored"
    return InputCurvature.of(layer, _sides(options, layer), _shared(options, layer), by_rows)
