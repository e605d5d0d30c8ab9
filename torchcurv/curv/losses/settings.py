"""What an optimizer was told of its loss, and which tensors of a model's output it may be applied to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from torchcurv.curv.checks import check_number
from torchcurv.curv.graph import age_of
from torchcurv.curv.losses.loss import Loss
from torchcurv.curv.losses.table import loss_of


@dataclass
class LossSettings:
    """loss_fn: a loss module, the name of a loss, or None (then only `observe` starts a pass).

    reduction, class_dim: as in `loss_of`. output_fn: from the model's output to the tensor that a named loss is
    applied to. grad_scaler: what scales the loss before backward(). loss_factor: what a named loss is multiplied by,
    where its gradient does not say it; a number, or a function without arguments. negative: see `with_signs`.
    """

    loss_fn: nn.Module | str | None
    reduction: str | None = None
    class_dim: int | None = None
    output_fn: Callable[[Any], Tensor] | None = None
    grad_scaler: Any = None
    loss_factor: float | Callable[[], float] = 1.0
    negative: str = "error"

    def __post_init__(self) -> None:
        if self.loss_fn is not None:
            loss = self.loss()  # unknown losses raise here
            if isinstance(self.loss_fn, str):
                loss.check_known_by_name()
        if self.output_fn is not None and not callable(self.output_fn):
            raise TypeError(
                f"output_fn={self.output_fn!r}; pass a function from the model's output to the tensor of logits"
            )

    @property
    def named(self) -> bool:
        """Whether the loss is known by its name alone."""
        return isinstance(self.loss_fn, str)

    def loss(self, module: Callable[..., Tensor] | None = None) -> Loss:
        """The loss with the settings that its module has now; module: what was called, a copy perhaps."""
        loss_fn = self.loss_fn if module is None else module
        assert loss_fn is not None
        return loss_of(loss_fn, self.reduction, self.class_dim)

    def observed(self, loss_fn: nn.Module | str | None) -> Loss:
        """The loss that `observe` was told of; None: this one."""
        loss_fn = self.loss_fn if loss_fn is None else loss_fn
        if loss_fn is None:
            raise ValueError("observe: no loss is known; pass loss_fn= here or to the optimizer")
        return loss_of(loss_fn, self.reduction if isinstance(loss_fn, str) else None, self.class_dim)

    def scale(self) -> Any:
        """The scale that a GradScaler put on the loss; as a tensor where it offers one without a sync."""
        scaler = self.grad_scaler
        if scaler is None:
            return 1.0
        read = getattr(scaler, "_get_scale_async", None)
        scale = read() if read is not None else None
        return scaler.get_scale() if scale is None else scale

    def factor(self) -> float:
        """What a named loss is multiplied by now, as the user says."""
        value = self.loss_factor() if callable(self.loss_factor) else self.loss_factor
        allowed = "a number that is not 0, or a function that returns one"
        check_number("loss_factor", value, lambda x: 0 < abs(x) < math.inf, allowed)
        return float(value)

    def outputs(self, output: Any, every: bool = False) -> list[Tensor]:
        """The tensors of a model's output that the loss may be applied to; of a named loss the one that it is.

        every: no loss is asked for, so that it may be any of them.
        """
        outputs = [out for out in _tensors(output) if out.grad_fn is not None and out.dim()]
        if every or not self.named:
            return outputs
        if self.output_fn is None and isinstance(output, Tensor) and not output.dim() and output.grad_fn is not None:
            return [output]  # a batch of one, squeezed, or the loss itself
        if self.output_fn is None:
            if len(outputs) > 1:
                raise ValueError(
                    f"the model returned {len(outputs)} tensors: pass output_fn=, a function from the model's output "
                    f"to the one that loss_fn={self.loss_fn!r} is applied to, or loss_fn=None and call "
                    "optimizer.observe"
                )
            return outputs
        f = self.output_fn(output)
        if not isinstance(f, Tensor) or (outputs and _order(f) > max(map(_order, outputs))):
            raise ValueError(
                f"output_fn returned a {'new tensor' if isinstance(f, Tensor) else type(f).__name__}; it must pick a "
                "tensor that the model returned and your loss is computed from. For anything else pass the loss "
                "module as loss_fn=, or loss_fn=None and call optimizer.observe"
            )
        return [f] if f.grad_fn is not None and f.dim() else []


def _order(tensor: Tensor) -> int:
    """Grows with the time of the operation that made the tensor; -1 for a leaf."""
    return -1 if tensor.grad_fn is None else age_of(tensor.grad_fn)


def _tensors(output: Any) -> Iterable[Tensor]:
    """The tensors in a model's output: a tensor, or tuples, lists, mappings and dataclass-like objects of them."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value)
    elif hasattr(output, "__dict__"):
        for value in vars(output).values():
            if isinstance(value, Tensor):
                yield value
