"""Steps of Levenberg and Marquardt that are tried: where they lead, by how much the loss falls, what that says of λ."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchcurv.curv.linalg.least_squares import DampedLeastSquares
from torchcurv.optim.control.residuals import MatrixFreeLeastSquares

System = DampedLeastSquares | MatrixFreeLeastSquares

# The first damping as a part of the largest entry of the diagonal of J^T J: Madsen, Nielsen, Tingleff (2004), 3.2.
FIRST_DAMPING = 1e-3
# What λ is multiplied by after a step that is rejected, and after one whose gain ratio is above ENOUGH (Nocedal and
# Wright, algorithm 4.1). That it shrinks by more than it grows is Transtrum and Sethna's advice (2012); these two
# took few steps on both equations of benchmarks/poisson.py, among some fifteen settings, ten seeds each.
GROWTH, SHRINKING, ENOUGH = 4.0, 0.1, 0.25
# Units in the last place of the loss, up to which a change of it says nothing.
NOISE = 8
# Transtrum and Sethna (2012): the part of a step that shows how the residuals bend along it, and the longest that the
# correction 2 c may be beside the step d.
PROBE, BENT = 0.1, 0.75
# Two evaluations at one point agree but for the order of sums; with points drawn anew they differ by about themselves.
REPEATS_WITHIN = 1e-2


def damping_factor(ratio: float) -> float:
    """What the damping is multiplied by, given the gain ratio of a step: actual over predicted."""
    if ratio > ENOUGH:
        return SHRINKING
    return 1.0 if ratio > 0 else GROWTH


class Path(NamedTuple):
    """Steps t d + t² c of length t."""

    d: Tensor
    c: Tensor | None = None

    def at(self, t: float) -> Tensor:
        return self.d * t if self.c is None else self.d * t + self.c * t**2

    def can_be_trusted(self, t: float) -> bool:
        """Whether c is small beside d, so that the expansion that it comes from holds so far."""
        return self.c is None or bool(2 * t * self.c.norm() <= BENT * self.d.norm())


class Trial(NamedTuple):
    """A step that was tried: its length, the change of the loss, and the one that the model of r + J d says."""

    length: float
    actual: float
    predicted: float

    @property
    def ratio(self) -> float:
        return self.actual / self.predicted if self.predicted < 0 else -math.inf

    def says_nothing(self, noise: float) -> bool:
        """Whether all that is left to gain is rounding of the loss."""
        return abs(self.predicted) <= noise and abs(self.actual) <= noise


class Point:
    """Where a step starts.

    system: the linear problem there. evaluate: the residuals at the parameters as they are. loss: at this point.
    """

    def __init__(
        self, system: System, evaluate: Callable[[], Tensor], params: list[Tensor], loss: float, eps: float
    ) -> None:
        self.system, self.evaluate, self.params, self.loss = system, evaluate, params, loss
        self.before = [p.clone() for p in params]
        self.noise = NOISE * eps * loss

    def move(self, d: Tensor, to_stay: bool = False) -> bool:
        """Parameters to d from here, unless that is not finite.

        But for moves that stay, autograd is not told: the graph at this point is used again after `restore`.
        """
        parts = d.split([p.numel() for p in self.params])
        pairs = zip(self.before, parts, strict=True)
        new = [(x + part.reshape(x.shape).to(x.device)).to(x.dtype) for x, part in pairs]
        if not all(bool(x.isfinite().all()) for x in new):
            return False
        for p, x in zip(self.params, new, strict=True):
            (p if to_stay else p.data).copy_(x)
        return True

    def restore(self) -> None:
        for p, x in zip(self.params, self.before, strict=True):
            p.data.copy_(x)

    def bent(self, d: Tensor, damping: float, lr: Tensor | None) -> Path:
        """The path along d with its correction c, solved for half of the second derivative of the residuals along d:
        r(θ + h d) = r + h J d + h²/2 r_dd, for a small h.
        """
        if not -self.change(d) > self.noise or not self.move(d * PROBE):
            return Path(d)
        there = self.evaluate().detach().to(self.system.r)
        self.restore()
        second = 2 / PROBE * ((there - self.system.r) / PROBE - self.system.times(d))
        return Path(d, scaled(0.5 * self.system.step(damping, second)[0], lr))

    def tried(self, path: Path, halvings: int) -> tuple[Trial, Trial]:
        """(the full step, the best of those along the path: at 1, 1/2, 1/4... as long as the loss falls on the way)."""
        found: list[Trial] = []
        for k in range(halvings + 1):
            t, loss = 0.5**k, math.inf
            if path.can_be_trusted(t) and self.move(path.at(t)):
                loss = float(half_square(self.evaluate()))
            actual = loss - self.loss if math.isfinite(loss) else math.inf
            found.append(Trial(t, actual, self.change(path.d * t)))
            best = min(found, key=lambda trial: trial.actual)
            if best.actual < 0 and best is not found[-1]:
                break
        return found[0], best

    def change(self, d: Tensor) -> float:
        """½ norm(r + J d)² - ½ norm(r)²."""
        return float(self.system.gradient @ d + 0.5 * self.system.times(d).square().sum())


def scaled(d: Tensor, lr: Tensor | None) -> Tensor:
    """lr d by element."""
    return d if lr is None else (d.double() * lr).to(d.dtype)


def half_square(r: Tensor) -> Tensor:
    """½ norm(r)², in float32 or better."""
    return 0.5 * r.detach().to(torch.promote_types(r.dtype, torch.float32)).square().sum()


def check_repeats(first: Tensor, again: Tensor) -> None:
    """Raise where two evaluations at one point differ."""
    if first.shape != again.shape or not bool((first - again).norm() <= REPEATS_WITHIN * first.norm()):
        raise ValueError(
            "two evaluations of the residuals at the same parameters differ, so that the loss before a step and after "
            'it cannot be compared: draw points and dropout masks before step(), or pass damping_rule="fixed" and '
            "line_search=0, which compare nothing"
        )
