"""The losses that a model computes itself: calls of torch's loss functions, seen while its forward runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torchcurv.curv.capture.calls import Capture
from torchcurv.curv.capture.hooks import is_internal_forward
from torchcurv.curv.capture.triggers import Listener, LossModule
from torchcurv.curv.compiler import uncompiled
from torchcurv.curv.graph import Edge, edge_of, tree_leaves
from torchcurv.curv.losses.joined import JoinedCall

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


class Watched(Protocol):
    """The hooks on a model, as they are asked here. losses: the mode in which its forward runs; due: layers."""

    losses: Any
    due: set[int]

    def capture_of(self, f: Tensor, several: bool = False) -> tuple[Capture, Edge] | None: ...


class InnerLosses:
    """Watches the forward passes of a model for loss functions that it calls.

    It begins when the model has returned a number beside something else, its loss perhaps, and ends if that was none.
    watching: whether it does; None: no such number was seen yet.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.mode = LossFunctions(self._note)
        self.watching: bool | None = None
        self.unseen = False  # whether there may have been one in a pass of this step that was not watched
        self._called = False  # in the forward pass that runs, whether what is due now reaches it or not
        self._forward: Watched | None = None

    def begin(self, forward: Watched) -> None:
        """Watch the next passes, if something is due."""
        self._forward, self.unseen = forward, False
        forward.losses = self.mode if self.watching and forward.due else None

    def ended(self, forward: Watched, output: Any) -> bool:
        """Whether the forward pass that ends has called one, or may have done so unseen."""
        called, self._called = self._called, False
        if self.watching is None and not isinstance(output, Tensor):
            numbers = [
                x for x in tree_leaves(output) if isinstance(x, Tensor) and not x.dim() and x.grad_fn is not None
            ]
            self.watching = True if numbers else None
            self.begin(forward)
            self.unseen = bool(numbers)
            return self.unseen
        if self.watching and not called:
            self.watching = False
            self.begin(forward)
        return called

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward = self._forward
        if is_internal_forward() or forward is None:
            return func(*args, **kwargs)

        def depends(x: Any) -> bool:
            return isinstance(x, Tensor) and x.grad_fn is not None and forward.capture_of(x, several=True) is not None

        f, target, settings = pair_of_call(func, args, kwargs)
        module = module_of(func, settings)
        loss: Any = module
        if module is None or not depends(f) or depends(target):
            outputs = [x for x in (*args, *kwargs.values()) if depends(x)]
            if not outputs:
                out = func(*args, **kwargs)
                self._called |= isinstance(out, Tensor) and out.requires_grad
                return out
            loss = JoinedCall(func, args, kwargs, depends, self._batch_of(outputs[0], func))
            f, target = loss.join(), loss.samples
            args, kwargs = loss.arguments(f)
        out = func(*args, **kwargs)
        found = forward.capture_of(f, several=True)
        if isinstance(out, Tensor) and out.requires_grad and found is not None:
            self._called = True
            capture, output_edge = found
            capture.count_loss()
            edge = edge_of(out)
            LossModule(self.listener, capture, edge.number, loss, output_edge, f, target).arm(edge.node)
        return out

    def _batch_of(self, x: Tensor, func: Any) -> int:
        dim = JoinedCall.batch_dim_of(func)
        return x.shape[dim] if x.dim() > dim else 1
