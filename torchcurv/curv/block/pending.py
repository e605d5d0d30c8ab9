"""What was measured for a block since the last step."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from torchcurv.curv.approximations.base import Approximation, Tensors
from torchcurv.curv.numerics import on_cpu, sum_of


class Pending:
    """Statistics of the passes since the last step, as the approximation collects them.

    total: the sum of all that was added: finite if they are; None where rows are kept, which are read later.
    task: the backward call that the last measurement belongs to. objection: why it cannot be used. remark: what is
    missing in it. doubts: by why it cannot be used, whether so, where an accelerator has not told yet.
    measured_for: the precision and the device that the parameters had.
    """

    def __init__(self, approx: Approximation) -> None:
        self.approx = approx
        self.tensors: Tensors = {}
        self.total: Tensor | None = None
        self.task: int | None = None
        self.objection: str | None = None
        self.remark: str | None = None
        self.doubts: dict[str, Tensor] = {}
        self.measured_for: tuple[torch.dtype, torch.device] | None = None

    def __bool__(self) -> bool:
        return bool(self.tensors)

    def begin(self, task: int, params: Collection[Tensor]) -> None:
        """A pass of backward call `task` starts: forget what was measured for gradients that are gone since
        (zero_grad, a step that a GradScaler skipped)."""
        if task != -1 and self.task != task and all(p.grad is None for p in params):
            self.forget()
        self.task = task
        if not self.tensors:
            p = next(iter(params))
            self.measured_for = p.dtype, p.device

    def add(self, measured: Tensors) -> None:
        """Add statistics to those that are here."""
        values = [value for value in measured.values() if isinstance(value, Tensor)]
        if values:
            total = sum_of(values)  # here, where they are still in the cache
            self.total = total if self.total is None else self.total + total
        self.tensors = self.approx.collected(self.tensors, measured)

    def follow(self, p: Tensor) -> None:
        """Go along where the parameters, of which this is one, have moved to another device or precision."""
        kind, self.measured_for = (p.dtype, p.device), (p.dtype, p.device)
        if not self.tensors:
            return
        like = p.new_zeros((), dtype=torch.promote_types(p.dtype, torch.float32))
        if not all(isinstance(x, Tensor) for x in self.tensors.values()):
            self.objection = (
                f"the model moved to {kind[0]} on {kind[1]} between backward() and step(), and the curvature is found "
                "in step() from inputs and signals that were kept as they were: call optimizer.zero_grad() after "
                "model.to(...), and then the model and backward()"
            )
        self.tensors = {key: x.to(like) if isinstance(x, Tensor) else x for key, x in self.tensors.items()}
        self.total = None if self.total is None else self.total.to(like)

    def scale(self, factor: Tensor | float) -> None:
        """Multiply the statistics that scale with the loss."""
        self.tensors = self.approx.scaled(self.tensors, factor)

    def object_if(self, wrong: Tensor, message: str) -> None:
        """What was measured is not to be used if `wrong`, a 0-d bool tensor: the step that would use it raises."""
        if not on_cpu(wrong):
            self.doubts[message] = wrong | self.doubts[message] if message in self.doubts else wrong
        elif wrong:
            self.objection = message

    def settle_doubts(self) -> None:
        """Object where a doubt is right: a host read."""
        right = [why for why, wrong in self.doubts.items() if wrong]
        self.objection, self.doubts = next(iter(right), self.objection), {}

    def edited(self, name: str) -> str | None:
        """What is wrong where inputs of rows, which are read in `step`, have changed; name: of the block."""
        if not self.tensors or not self.approx.edited(self.tensors):
            return None
        return (
            f"the inputs of block {name!r} were edited in place between backward() and step(): its curvature is found "
            "from them in step(). Give every batch a tensor of its own"
        )

    def doubt_if(self, missing: Tensor, message: str) -> None:
        """What was measured lacks something if `missing`; on an accelerator that is not asked."""
        if on_cpu(missing) and missing:
            self.remark = message

    def forget(self) -> None:
        self.tensors, self.total, self.objection, self.remark = {}, None, None, None
        self.doubts = {}

    def take(self) -> tuple[Tensors, Tensor | None]:
        """(the statistics, their total); nothing is left."""
        tensors, total = self.tensors, self.total
        self.forget()
        return tensors, total
