"""When the statistics of a block are measured, and when they are factored."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


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


class RefreshSchedule:
    """When a block is measured and factored.

    next_update, next_refactor: the steps at which a measurement and a factorisation are due. paces: by statistic, where
    the intervals are adaptive. drifts: by statistic, how far its average has moved since the last factorisation.
    due: the statistics that the next passes measure.
    """

    def __init__(self, statistics: Collection[str]) -> None:
        self.statistics = tuple(statistics)
        self.next_update = self.next_refactor = 0
        self.due: Collection[str] = self.statistics
        self.restart()
        self.drifts = dict.fromkeys(self.statistics, math.inf)

    def restart(self) -> None:
        """Adaptive intervals start anew."""
        self.paces = {name: AdaptiveInterval() for name in self.statistics}

    @property
    def adapted(self) -> bool:
        """Whether intervals have been adaptive."""
        return any(pace.next for pace in self.paces.values())

    def select_due(self, step: int | None) -> None:
        """Measure what is due at a step of an adaptive interval; None: everything."""
        due = [name for name, pace in self.paces.items() if step is None or step >= pace.next]
        self.due = due or self.statistics

    def decide(self, step: int | None, changes: Mapping[str, float], tol: float, cap: int, warmup: int) -> None:
        """Take note of how far each statistic moved and, at a step of an adaptive interval, when it is measured next.

        tol, cap, warmup: the options refresh_tol, refresh_cap and refresh_warmup.
        """
        for name, change in changes.items():
            self.drifts[name] += change
            if step is not None:
                self.paces[name].decide(step, change, tol, cap, warmup)
        if step is not None:
            self.next_update = min(pace.next for pace in self.paces.values())

    def factored(self) -> None:
        """There is a factor of the averages as they are."""
        self.drifts = dict.fromkeys(self.statistics, 0.0)

    def has_drifted(self, tol: float) -> bool:
        """Whether a statistic has moved by the tolerance since the last factorisation."""
        return any(not drift < tol for drift in self.drifts.values())

    def state(self) -> dict[str, Any]:
        return {
            "next_update": self.next_update,
            "next_refactor": self.next_refactor,
            "paces": {name: pace.state() for name, pace in self.paces.items()},
            "drifts": dict(self.drifts),
        }

    def load_state(self, saved: Mapping[str, Any]) -> None:
        """Continue from what `state` returned; at once from nothing."""
        self.next_update, self.next_refactor = int(saved.get("next_update", 0)), int(saved.get("next_refactor", 0))
        paces, drifts = saved.get("paces", {}), saved.get("drifts", {})
        self.paces = {name: AdaptiveInterval(**paces.get(name, {})) for name in self.statistics}
        self.drifts = {name: drifts.get(name, math.inf) for name in self.statistics}
