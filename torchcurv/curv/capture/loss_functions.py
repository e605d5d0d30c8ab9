"""Losses that a model computes itself: torch's loss functions, seen while its forward runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchcurv.curv.graph import uncompiled

# By function: the module that says its settings, for a loss whose formula is known; None: by autograd.
FUNCTIONS: dict[Any, Callable[..., nn.Module] | None] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.nll_loss: nn.NLLLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.binary_cross_entropy: None,
    F.ctc_loss: None,
    F.gaussian_nll_loss: None,
    F.huber_loss: None,
    F.kl_div: None,
    F.l1_loss: None,
    F.margin_ranking_loss: None,
    F.multi_margin_loss: None,
    F.multilabel_soft_margin_loss: None,
    F.poisson_nll_loss: None,
    F.smooth_l1_loss: None,
    F.soft_margin_loss: None,
    F.triplet_margin_loss: None,
}
# (function, positional and named arguments) -> what it returned, noted
Note = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


class LossFunctions(TorchFunctionMode):
    """While it is active, calls of torch's loss functions go through `note`, but for those that another loss makes."""

    def __init__(self, note: Note) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in FUNCTIONS:
            return func(*args, **kwargs)
        if torch.compiler.is_compiling():
            return uncompiled(self.note, (func, args, kwargs), {})
        return self.note(func, args, kwargs)


def pair_of_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """(what is compared, with what, the settings) of a call."""
    given = inspect.signature(func).bind(*args, **kwargs).arguments
    names = iter(given)
    first, second = next(names), next(names)
    rest = {key: value for key, value in given.items() if key not in (first, second)}
    return given[first], given[second], {key: value for key, value in rest.items() if key not in _OLD}


_OLD = ("size_average", "reduce")  # which torch has given up


def module_of(func: Any, settings: dict[str, Any]) -> nn.Module | None:
    """The module of a known loss with these settings."""
    make = FUNCTIONS[func]
    if make is None or not all(isinstance(x, Tensor | str | int | float | None) for x in settings.values()):
        return None
    return make(**settings)
