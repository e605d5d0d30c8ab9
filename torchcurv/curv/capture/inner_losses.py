"""The losses that a model computes itself, as triggers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchcurv.curv.capture.forward import Forward
from torchcurv.curv.capture.hooks import is_internal_forward
from torchcurv.curv.capture.loss_functions import LossFunctions, module_of, pair_of_call
from torchcurv.curv.capture.triggers import Listener, LossModule
from torchcurv.curv.graph import edge_of, tree_leaves
from torchcurv.curv.losses.joined import JoinedCall


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
        self._found = False  # in the forward pass that runs
        self._forward: Forward | None = None

    def begin(self, forward: Forward) -> None:
        """Watch the next passes, if something is due."""
        self._forward, self.unseen = forward, False
        forward.losses = self.mode if self.watching and forward.due else None

    def ended(self, forward: Forward, output: Any) -> bool:
        """Whether the forward pass that ends has called one, or may have done so unseen."""
        found, self._found = self._found, False
        if self.watching is None and not isinstance(output, Tensor):
            numbers = [
                x for x in tree_leaves(output) if isinstance(x, Tensor) and not x.dim() and x.grad_fn is not None
            ]
            self.watching = True if numbers else None
            self.begin(forward)
            self.unseen = bool(numbers)
            return self.unseen
        if self.watching and not found:
            self.watching = False
            self.begin(forward)
        return found

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
                return func(*args, **kwargs)
            loss = JoinedCall(func, args, kwargs, depends, self._batch_of(outputs[0], func))
            f, target = loss.join(), loss.samples
            args, kwargs = loss.arguments(f)
        out = func(*args, **kwargs)
        found = forward.capture_of(f, several=True)
        if isinstance(out, Tensor) and out.requires_grad and found is not None:
            capture, output_edge = found
            capture.count_loss()
            edge = edge_of(out)
            LossModule(self.listener, capture, edge.number, loss, output_edge, f, target).arm(edge.node)
            self._found = True
        return out

    def _batch_of(self, x: Tensor, func: Any) -> int:
        dim = JoinedCall.batch_dim_of(func)
        return x.shape[dim] if x.dim() > dim else 1
