"""Damping policies: what is added to the eigenvalues of a block, for steps and for draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from torchcurv.curv.block.block import Curvature
from torchcurv.curv.kinds.table import KINDS

Group = dict[str, Any]
Number = float | Tensor

# Relative change of the damping after which a factor that holds it is computed anew. Below it, the step differs from
# the one asked for by less than what the noise of the curvature itself makes.
DAMPING_TOLERANCE = 0.1


class DampingPolicy(Protocol):
    """What an optimizer adds to its curvatures."""

    def nominal(self, group: Group, step: int) -> Number:
        """λ as the user gave it; when it changes, factors that hold it are computed anew."""

    def shift(self, block: Curvature, group: Group, step: int) -> Number:
        """What is added to the eigenvalues of a block in a step."""

    def of_draws(self, group: Group, step: int) -> float | None:
        """What is added to them for draws, where these need a factor of their own; else None."""


class StepDamping:
    """λ + l2, or with damping_scale="relative" λ tr C / dim C + l2.

    L2 regularisation is part of the loss, so that its coefficient adds to the curvature of the loss. Input curvature is
    none of the loss.
    """

    def nominal(self, group: Group, step: int) -> Number:
        return group["damping"] + _l2(group)

    def shift(self, block: Curvature, group: Group, step: int) -> Number:
        if group.get("damping_scale", "absolute") == "absolute":
            return self.nominal(group, step)
        return group["damping"] * block.mean_eigenvalue() + _l2(group)

    def of_draws(self, group: Group, step: int) -> float | None:
        return None


@dataclass(frozen=True)
class PosteriorDamping:
    """δ̃ + λ in a step and δ̃ in a draw, δ̃ = τ δ / N of the prior.

    prior: from a group and a step to its δ̃. apart: whether one factor of a group cannot serve both.
    """

    prior: Callable[[Group, int], float]
    apart: Callable[[Group], bool]

    def nominal(self, group: Group, step: int) -> Number:
        return self.prior(group, step) + group["damping"]

    def shift(self, block: Curvature, group: Group, step: int) -> Number:
        return self.nominal(group, step)

    def of_draws(self, group: Group, step: int) -> float | None:
        return self.prior(group, step) if self.apart(group) else None


def is_of_the_loss(group: Group) -> bool:
    """Whether the curvature of a group is that of a loss, in its units."""
    kind = KINDS.get(group["curv_type"])  # an unknown name is refused where options are checked
    return kind is None or kind.of_the_loss


def _l2(group: Group) -> float:
    return group.get("l2", 0.0) if is_of_the_loss(group) else 0.0


def has_changed(damping: Number, held: float) -> bool:
    """Whether a damping is another than the one that a factor holds. A tensor is never read."""
    return not isinstance(damping, Tensor) and abs(damping - held) > DAMPING_TOLERANCE * abs(held)


def is_zero(value: Any) -> bool:
    return not isinstance(value, Tensor) and value == 0
