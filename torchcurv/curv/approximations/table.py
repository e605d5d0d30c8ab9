"""The table of approximations: from options and layers to the entry of a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from torchcurv.curv.approximations.base import Approximation
from torchcurv.curv.approximations.by_rows import ByRows
from torchcurv.curv.approximations.dense import Dense
from torchcurv.curv.approximations.diagonal import Diagonal
from torchcurv.curv.approximations.input_covariance import input_curvature
from torchcurv.curv.approximations.kronecker import Kronecker, Sides
from torchcurv.curv.approximations.low_rank import LowRank
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.options import Options, allow

Entry = Callable[[Options, list[Layer]], Approximation]


@dataclass(frozen=True)
class Row:
    """One approximation of the table; see `register_approximation`."""

    entry: Entry
    joins: bool
    hessian: tuple[str, ...]


APPROXIMATIONS: dict[str, Row] = {}
allow("approx", APPROXIMATIONS)


def register_approximation(
    name: str, entry: Entry, *, joins: bool = False, hessian: tuple[str, ...] = ("exact",)
) -> None:
    """Let `approx=name` mean an approximation of your own.

    entry: from the options of a block and its layers to a subclass of torchcurv.curv.approximations.base.Approximation.
    joins: whether one block covers all layers with equal options, unless `partition` says otherwise; else each layer
        has its own. hessian: the values of `hessian_method` that it knows, the default first.
    """
    if not callable(entry):
        raise TypeError(f"register_approximation: got {entry!r}; pass a function from (options, layers)")
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"register_approximation: name={name!r}; pass a name such as 'diag_kfac'")
    if name in APPROXIMATIONS:
        raise ValueError(f"register_approximation: the name {name!r} is taken: choose another one")
    APPROXIMATIONS[name] = Row(entry, joins, tuple(hessian))


def approximation_of(block: str, options: Options, layers: list[Layer]) -> Approximation:
    """What a block keeps. block: its name, for messages."""
    assert options.approx is not None
    size = _size(layers)
    made = APPROXIMATIONS[options.approx].entry(options, layers)
    if made.of_one_step and not options.kind.sends_signals and options.kind.of_the_loss:
        raise ValueError(
            f"block {block!r} has {size} parameters, and its Hessian is kept as a matrix: raise rows_limit="
            f'{options.rows_limit}, or choose approx="unit" or "diag"'
        )
    return made


def _size(layers: list[Layer]) -> int:
    return sum(torch.Size(layer.shape).numel() for layer in layers)


def spectrum_rule(options: Options) -> str | None:
    if not options.kind.indefinite:
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
    unknown = not options.kind.sends_signals or apart or any(s.transposed or s.view.tokens for s in layer.sites)
    return "expand" if options.sharing == "whole" and unknown else options.sharing


def _kronecker(options: Options, layer: Layer, corrected: bool = False) -> Kronecker:
    of_mean_input = options.curv_type == "hessian" and options.hessian_averaging == "batch"
    shared, sides = _shared(options, layer), _sides(options, layer)
    return Kronecker(shared, corrected, sides, spectrum_rule(options), of_mean_input)


def _kfac(options: Options, layer: Layer) -> Approximation:
    if options.kind.of_the_loss:
        return _kronecker(options, layer)
    each_step = options.ema_decay == 0 and options.update_every == 1 and options.refactor_every == 1
    by_rows = each_step and options.damping_type == "factored"
    return input_curvature(layer, _sides(options, layer), _shared(options, layer), by_rows)


def _dense(options: Options, layers: list[Layer]) -> Approximation:
    return ByRows() if _size(layers) > options.rows_limit else Dense(spectrum=spectrum_rule(options))


def _unit(options: Options, layers: list[Layer]) -> Approximation:
    return Dense(True, _wide(options, layers[0]), spectrum_rule(options))


def _ekfac(options: Options, layers: list[Layer]) -> Approximation:
    return _kronecker(options, layers[0], corrected=True)


def _low_rank(options: Options, layers: list[Layer]) -> Approximation:
    return LowRank(min(options.rank, _size(layers)), spectrum_rule(options), options.rows_limit)


register_approximation("full", _dense, joins=True)
register_approximation("block", _dense)
register_approximation("unit", _unit)
register_approximation("kfac", lambda options, layers: _kfac(options, layers[0]), hessian=("propagate",))
register_approximation("ekfac", _ekfac, hessian=())
register_approximation(
    "diag",
    lambda options, layers: Diagonal(spectrum_rule(options)),
    hessian=("propagate", "exact", "hutchinson", "price"),
)
register_approximation("lowrank", _low_rank, joins=True)
