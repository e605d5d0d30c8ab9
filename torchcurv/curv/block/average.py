"""The running average of a block, and when it is measured where its intervals are adaptive."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchcurv.curv.approximations.base import Tensors, part_of
from torchcurv.curv.approximations.factors import LowRankEigen
from torchcurv.curv.approximations.rows import JacobianRows
from torchcurv.curv.block.measurement import Measurement
from torchcurv.curv.block.refresh import AdaptiveInterval
from torchcurv.curv.layers.layer import Layer
from torchcurv.curv.numerics import on_cpu
from torchcurv.curv.options import Options


class RunningAverage(Measurement):
    """A block and the running average of what was measured for it (`tensors`, with their `weights`)."""

    def __init__(self, name: str, layers: list[Layer], options: Options) -> None:
        super().__init__(name, layers, options)
        self.next_update = self.next_refactor = 0  # the steps at which a measurement and a factorisation are due
        self.paces = {part: AdaptiveInterval() for part in self.approx.parts}  # where the intervals are adaptive
        self.change_since_factorisation = dict.fromkeys(
            self.approx.parts, math.inf
        )  # moves since the last factorisation, added up
        self.changes: Tensors = {}  # by part, how far the last measurement moved it
        self.tensors: Tensors = {}
        self.weights: Tensors = {}
        self.flags: Tensor | None = None  # how many measurements were not finite, how many factorisations failed
        self.reported = (0, 0)  # what was last read of them
        self.measurements = self.factorisations = 0  # so far
        self.measured_at: dict[str, int] = {}  # by part, the step of the last measurement
        # of adaptive intervals; a group may change them
        self.refresh_tol, self.refresh_cap = options.refresh_tol, options.refresh_cap
        self.refresh_warmup = options.refresh_warmup

    @torch.no_grad()
    def update(
        self, ema_decay: float, refresh_factor: bool = True, step: int | None = None, track_change: bool = False
    ) -> None:
        """Merge what is pending into the running average: w <- ρ^k w + 1, X <- X + (X_new - X) / w.

        refresh_factor: whether the factor takes over what it can; a factorisation that comes next does that anyway.
        step: of the optimizer, k = 1 without; k are the steps since the last measurement, so that the memory in steps
        does not depend on how often one measures. track_change: let `changes` say how far the averages move.
        A measurement with a value that is not finite is left out and counted.
        """
        self._check_rows()
        self.measurements += 1
        if self.uses_rows:
            self.factor = JacobianRows(tuple(self.pending_rows))
            self.forget_pending()
            return
        if self.approx.keeps_rows:
            self._merge(ema_decay ** self._since("values", step), track_change)
            if step is not None:
                self.measured_at[""] = step
            if refresh_factor:
                self._follow()
            return
        if self.input_rows:
            if ema_decay:
                raise ValueError(
                    f"block {self.name!r} was built with ema_decay=0, so that it keeps no running average, and has "
                    f"ema_decay={ema_decay} now: build the optimizer with ema_decay > 0"
                )
            self.forget_running()
        new = self.pending
        assert self.pending_sum is not None
        ok = torch.isfinite(self.pending_sum)
        self.forget_pending()
        self._count(0, ~ok)
        new = self.approx.normalised_measurement(new)
        for key, value in new.items():
            if key not in self.weights:
                self.weights[key], self.tensors[key] = value.new_zeros(()), torch.zeros_like(value)
            old, weight = self.tensors[key], self.weights[key]
            decayed_weight = weight * ema_decay ** self._since(key, step)
            new_weight = decayed_weight + 1
            if track_change and value.dim():
                moved = 1 / new_weight * torch.dist(value, old) / old.norm()
                self._note_change(key, torch.where(old.any(), moved, math.inf))
            if not on_cpu(ok):
                self.weights[key] = torch.where(ok, new_weight, decayed_weight)
                self.tensors[key] = torch.where(ok, old.lerp(value, 1 / new_weight), old)
            else:
                self.weights[key] = new_weight if ok else decayed_weight
                if ok:
                    old.lerp_(value, 1 / new_weight)
        if step is not None:
            self.measured_at |= {part_of(key, self.approx.parts): step for key in new}
        if refresh_factor:
            self._follow()

    def _since(self, key: str, step: int | None) -> int:
        """Steps since the last measurement of a statistic."""
        last = self.measured_at.get(part_of(key, self.approx.parts))
        return 1 if step is None or last is None else max(1, step - last)

    def _note_change(self, key: str, change: Tensor) -> None:
        """The largest relative move of the statistics of a part; infinite for the first measurement."""
        part = part_of(key, self.approx.parts)
        self.changes[part] = torch.maximum(self.changes[part], change) if part in self.changes else change

    def decide(self, step: int | None, changes: dict[str, float]) -> None:
        """Take note of how far each part moved and, at a step of an adaptive interval, when it is measured next."""
        for part, change in changes.items():
            self.change_since_factorisation[part] += change
            if step is not None:
                self.paces[part].decide(step, change, self.refresh_tol, self.refresh_cap, self.refresh_warmup)
        self.changes = {}
        if step is not None:
            self.next_update = min(pace.next for pace in self.paces.values())

    def select_due(self, step: int | None) -> None:
        """Measure what is due at a step of an adaptive interval; None: everything."""
        due = [part for part, pace in self.paces.items() if step is None or step >= pace.next]
        self.due_statistics = due or self.approx.parts

    @property
    def has_drifted(self) -> bool:
        """Whether a statistic has moved by the tolerance since the last factorisation."""
        return any(not drift < self.refresh_tol for drift in self.change_since_factorisation.values())

    def forget_running(self) -> None:
        """Forget the running averages but not the factor, whose basis the next measurement may ask for."""
        self.tensors, self.weights = {}, {}

    def _merge(self, decayed_weight: float, track_change: bool) -> None:
        """The running average of a block that keeps its largest eigenpairs: those of the weighted sum.

        decayed_weight: what is left of the old weight.
        """
        new = self.pending_rows
        self.forget_pending()
        p = self.params[0]
        zero = p.new_zeros((), dtype=torch.promote_types(p.dtype, torch.float32))
        before = self.weights.get("values", zero)
        old = self.tensors or self.approx.empty(self.layers, zero)
        weight = before * decayed_weight + 1
        merged, ok = self.approx.merged([(1 / weight, new), (1 - 1 / weight, [LowRankEigen(**old)])])
        self._count(0, ~ok)
        if track_change:
            known = old["values"].any()
            self._note_change("values", torch.where(known, merged.distance(LowRankEigen(**old)), math.inf))
        self.tensors = {key: torch.where(ok, getattr(merged, key), value) for key, value in old.items()}
        self.weights = dict.fromkeys(old, torch.where(ok, weight, before * decayed_weight))

    def _follow(self) -> None:
        """Statistics that are eigenvalues in the basis of the factor, or all of it, reach it at once."""
        if self.factor is not None:
            self.factor = self.approx.follow(self.tensors, self.factor, self.options.damping_type)

    def _count(self, which: int, bad: Tensor) -> None:
        if on_cpu(bad) and not bad:
            return
        if self.flags is None:
            self.flags = torch.zeros(2, dtype=torch.int32, device=bad.device)
        self.flags[which] += bad

    def count_skipped(self) -> None:
        """What was measured was not finite, and is left out."""
        self._count(0, torch.ones((), dtype=torch.bool, device=self.params[0].device))

    def scale(self, factor: Tensor | float) -> None:
        """Multiply the statistics that scale with the loss."""
        if self.uses_rows and self.factor is not None:
            self.factor = self.factor.scaled(factor)
        for key in self.approx.linear:
            if key in self.tensors:
                self.tensors[key] = self.tensors[key] * factor

    @property
    def measured(self) -> bool:
        return bool(self.tensors) or (self.uses_rows and self.factor is not None)

    def mean_eigenvalue(self) -> Tensor:
        """Its magnitude, a 0-d tensor; of what has been measured."""
        trace = self.factor.trace() if self.uses_rows and self.factor else self.approx.trace(self.tensors)
        return trace.abs().clamp_min(torch.finfo(trace.dtype).tiny * 1e6) / self.size


def read_flags(blocks: Sequence[RunningAverage]) -> list[tuple[int, int]]:
    """(measurements that were not finite, factorisations that failed) of each block; one host sync."""
    flags = [block.flags for block in blocks if block.flags is not None]
    counts = iter(torch.stack([flag.to(flags[0].device) for flag in flags]).tolist() if flags else ())
    return [(0, 0) if block.flags is None else tuple(next(counts)) for block in blocks]
