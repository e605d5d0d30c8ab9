"""When the statistics of a block are measured, where its intervals are adaptive."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class AdaptiveInterval:
    """How often one statistic is measured: ever more rarely while its running average X stands still.

    With d_t = norm(X_t - X_t-1) / norm(X_t-1) (Frobenius) at the t-th measurement and i_t the steps before it,

        d_t >= tol                      i_t+1 = max(1, i_t // 2)
        d_t < tol <= d_t + d_t-1        i_t+1 = i_t
        d_t + d_t-1 < tol               i_t+1 = i_t + i_t-1, up to a cap

    The sum bounds the distance to the average before the last. Source: Osawa et al., "Scalable and practical natural
    gradient for large-scale deep learning" (2020), of single measurements; with running averages, noise that the
    average takes out does not count as a change.

    next: the step at which it is due.
    """

    next: int = 0
    interval: int = 1
    before: int = 1
    change: float = math.inf

    def decide(self, step: int, change: float, tol: float, cap: int, warmup: int) -> None:
        """It was measured at a step and moved by `change`; after one that is not finite it is measured at once."""
        interval = self.interval
        if not math.isfinite(change) or step < warmup:
            interval = 1
        elif change >= tol:
            interval = max(1, interval // 2)
        elif change + self.change < tol:
            interval = min(cap, interval + self.before)
        self.before, self.interval = self.interval, interval
        self.next, self.change = step + interval, change

    def state(self) -> dict[str, int | float]:
        return dict(vars(self))
