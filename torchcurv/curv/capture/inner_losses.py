"""The losses that a model computes itself, as triggers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torchcurv.curv.capture.forward import Forward
from torchcurv.curv.capture.hooks import is_internal_forward
from torchcurv.curv.capture.loss_functions import LossFunctions, module_of, pair_of_call
from torchcurv.curv.capture.triggers import Listener, LossModule
from torchcurv.curv.graph import edge_of
from torchcurv.curv.losses.joined import JoinedCall


class InnerLosses:
    """Watches the forward passes of a model for loss functions that it calls.

    Whether it calls any is seen in the first pass: each function of a watched pass costs a few microseconds more.
    """

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.mode = LossFunctions(self._note)
        self.calls: bool | None = None  # whether the model calls any; None: not known yet
        self._found = False  # in the forward pass that runs
        self._forward: Forward | None = None

    def begin(self, forward: Forward) -> None:
        """Watch the next passes, if something is due."""
        self._forward = forward
        forward.losses = None if self.calls is False or not forward.due else self.mode

    def ended(self, forward: Forward) -> bool:
        """Whether the forward pass that ends has called one."""
        found, self._found = self._found, False
        if self.calls is None:
            self.calls = found
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
