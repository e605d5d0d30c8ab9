"""Damping rules: how a step that was made changes the damping of the next ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.block.block import STEP
from torchcurv.curv.block.reading import effective_dimension_of
from torchcurv.optim.control.quadratic_model import Evaluation, Vector
from torchcurv.optim.engine.damping import is_of_the_loss
from torchcurv.optim.update import dot, levenberg_marquardt

# So many directions per output of a batch (samples times classes, or pixels) are left to the curvature: a batch fits
# any model that has more directions than it has outputs, so that ρ says nothing there. The value was chosen together
# with the default of the relative damping, on the problems of benchmarks/defaults.py.
MAX_DIMENSIONS_PER_OUTPUT = 4.5


class FixedDamping:
    """The damping is what the groups say."""

    needs_closure = False

    def steps_to_check(self, settings: dict[str, Any], step: int, bad: bool) -> int:
        """Over how many steps the damping is to change after this one; 0: not at all. bad: whether the last step was
        rejected, or did harm."""
        return 0

    def adapt(
        self, optimizer: Any, evaluation: Evaluation, before: Vector, steps: int, jumped: bool, harmed: bool
    ) -> bool:
        """Change the damping of the groups; whether the step is rejected.

        jumped: whether the loss of this batch is far above those of the batches before. harmed: whether the last step
        made it larger.
        """
        return False


class LevenbergMarquardt:
    """The damping shrinks where a quadratic model predicts well how the loss changes, and grows where it does not."""

    needs_closure = True

    def steps_to_check(self, settings: dict[str, Any], step: int, bad: bool) -> int:
        """The first T steps one by one, and one that comes after a bad step; then all T."""
        interval = settings["damping_interval"]
        if step < 0:
            return 0
        if (step + 1) % interval == 0 and step >= interval:
            return interval
        return int(step < interval or bad)

    def adapt(
        self, optimizer: Any, evaluation: Evaluation, before: Vector, steps: int, jumped: bool, harmed: bool
    ) -> bool:
        """Levenberg and Marquardt's rule, for the step that was made, to count for so many; one host read.

        Where the last step did harm to this batch the damping grows whatever ρ says, and where the loss has jumped as
        much as for a whole interval: a small batch is fitted well by a step that does harm to the others.
        """
        moved = {p: (p.detach() - x).to(torch.promote_types(x.dtype, torch.float32)) for p, x in before.items()}
        l2 = {p: group["l2"] for group in optimizer.param_groups for p in group["params"]}
        gradients = {p: p.grad for p in before if p.grad is not None}
        slope = dot(moved, gradients)
        curvature, change = evaluation.actual_change(moved, before, slope)
        decay = dot(moved, before, l2) + 0.5 * dot(moved, moved, l2)
        predicted, actual = slope + 0.5 * curvature + decay, change + decay
        dimension = effective_dimension(optimizer, evaluation.value)
        ratio = torch.where(predicted == 0, torch.nan, actual.double() / predicted.double())
        optimizer.noted.update(predicted=predicted, actual=actual, ratio=ratio, effective_dimension=dimension)
        read = torch.stack([x.double() for x in (actual, predicted, evaluation.rounding, dimension)]).tolist()
        dimension_ratio = read[3] / (MAX_DIMENSIONS_PER_OUTPUT * evaluation.num_outputs)
        omega = optimizer.settings["damping_decay"] ** steps
        factor = levenberg_marquardt(read[0], read[1], omega, read[2])
        if dimension_ratio > 2 / 3:  # smaller by ω, it would leave up to half as many more
            factor = max(1.0, factor)
        if dimension_ratio > 1 or harmed:
            factor = 1 / omega
        if jumped:
            factor = optimizer.settings["damping_decay"] ** -optimizer.settings["damping_interval"]
        low, high = optimizer.settings["damping_bounds"]
        for group in optimizer.param_groups:
            group["damping"] = min(high, max(low, group["damping"] * factor))
        return not read[0] <= read[2]


DAMPING_RULES: dict[str, Callable[[], FixedDamping | LevenbergMarquardt]] = {
    "fixed": FixedDamping,
    "lm": LevenbergMarquardt,
}


def effective_dimension(optimizer: Any, like: Tensor) -> Tensor:
    """Σ tr C (C + λ)^-1 over the blocks whose C is that of the loss."""
    total = torch.zeros_like(like, dtype=torch.float64)
    for block, group in optimizer.engine.by_group():
        if is_of_the_loss(group) and block.factors[STEP].ready:
            total += effective_dimension_of(block, optimizer.engine.shift(block, group)).to(total.device)
    return total
