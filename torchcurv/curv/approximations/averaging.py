"""Statistics of an approximation: what is measured on its own, and what becomes of it until a step.

The answers here are right for what adds up over signals, micro-batches and ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchcurv.curv.numerics import on_cpu

Tensors = dict[str, Any]  # by key: tensors, or rows that are read later


@dataclass(frozen=True)
class Statistic:
    """What is measured on its own, when it is due.

    keys: those it may consist of. scales_with_loss: whether they are multiplied where the loss is. needs_signals:
    whether they are made of gradients at the layer's outputs; else the layer's inputs are enough.
    """

    keys: tuple[str, ...]
    scales_with_loss: bool
    needs_signals: bool


@dataclass(frozen=True)
class Averaged:
    """Running averages with a measurement merged in.

    tensors: those that have changed. ok: whether the measurement was finite; else they are as before, or zero.
    changes: by key, norm(new - old) / norm(old), infinite for the first measurement; where it was asked for.
    """

    tensors: Tensors
    ok: Tensor
    changes: dict[str, Tensor] = field(default_factory=dict)


class Forms:
    """Forms that a measurement may have, which do not add up to one another: here there is one.

    marks: keys that say so beside the averages, 0-d.
    """

    marks: ClassVar[tuple[str, ...]] = ()

    def of(self, tensors: Tensors) -> tuple[bool, ...]:
        """Which of them a measurement has."""
        return ()

    def unified(self, tensors: Tensors, there: Sequence[bool]) -> Tensors:
        """A measurement, or zeros, in the form that can be added up where processes have those that are there."""
        return tensors


class Refusing:
    """What has answers that may be refused by name."""

    def _refused(self, why: str) -> NotImplementedError:
        return NotImplementedError(f"the approximation {type(self).__name__} {why}")


ONE_FORM = Forms()


class Averaging(Refusing):
    """How statistics are added up between steps, and averaged over them."""

    keeps_inputs: ClassVar[bool] = False  # whether the averages refer to inputs, which must not outlive the step

    forms: ClassVar[Forms] = ONE_FORM

    symmetric: ClassVar[tuple[str, ...]] = ()  # keys of matrices that are, or that count by their lower triangle

    @property
    def statistics(self) -> Mapping[str, Statistic]:
        """What is measured on its own where intervals are adaptive, by name; {"": Statistic(...)} where it is one."""
        raise self._refused("does not say what it keeps: define `statistics`")

    @property
    def gathered(self) -> tuple[str, ...]:
        """Keys of what processes collect of one another; all else is summed."""
        return ()

    def statistic_of(self, key: str) -> str:
        """The name of the statistic that a key belongs to."""
        for name, statistic in self.statistics.items():
            if key in statistic.keys:
                return name
        raise self._refused(f"measures {key!r}, which is none of the keys of its `statistics`: add it to one of them")

    def collected(self, held: Tensors, new: Tensors) -> Tensors:
        """What was measured so far with what was measured now; both may be changed."""
        for key, value in new.items():
            held[key] = held[key] + value if key in held else value
        return held

    def scaled(self, tensors: Tensors, factor: Tensor | float) -> Tensors:
        """The statistics of a multiple of the loss."""
        scaling = {
            key for statistic in self.statistics.values() if statistic.scales_with_loss for key in statistic.keys
        }
        return {key: value * factor if key in scaling else value for key, value in tensors.items()}

    def measured_keys(self, new: Tensors) -> AbstractSet[str]:
        """The keys of the averages that a measurement changes."""
        return new.keys()

    def averaged(
        self, old: Tensors, new: Tensors, total: Tensor | None, shares: Mapping[str, Tensor], track_change: bool
    ) -> Averaged:
        """X + share (X_new - X), for what was measured; X may be changed in place.

        total: a sum of all of `new`, finite if it is. shares: those of the new in the sum of weights, by key.
        track_change: whether `changes` are asked for.
        """
        assert total is not None
        ok, tensors, changes = torch.isfinite(total), Tensors(), dict[str, Tensor]()
        for key, value in self.normalised_measurement(new).items():
            before = old[key] if key in old else torch.zeros_like(value)
            value = value if value.dtype == before.dtype else value.to(before.dtype)  # of a use in another precision
            if track_change and value.dim():
                moved = shares[key] * self.norm_of(key, value - before) / self.norm_of(key, before)
                changes[key] = torch.where(before.any(), moved, torch.inf)
            if on_cpu(ok):
                tensors[key] = before.lerp_(value, shares[key]) if ok else before
            else:
                tensors[key] = torch.where(ok, before.lerp(value, shares[key]), before)
        return Averaged(tensors, ok, changes)

    def norm_of(self, key: str, value: Tensor) -> Tensor:
        """The Frobenius norm of a statistic."""
        return value.norm()

    def normalised_measurement(self, tensors: Tensors) -> Tensors:
        """What was measured for one step, with as much weight in an average as that of any other."""
        return tensors

    def rows_held(self, tensors: Tensors) -> int | None:
        """How many rows there are, where many are better sent as a matrix; None: there is none."""
        return None

    def condensed(self, tensors: Tensors, rows: int) -> Tensors:
        """What is sent where all processes have so many rows."""
        return tensors

    def edited(self, pending: Tensors) -> bool:
        """Whether inputs that are read later were edited in place since they were kept."""
        return False

    @property
    def of_one_step(self) -> bool:
        """Whether it holds what one step measured: no average, nothing to save."""
        return False

    @property
    def forbids_memory(self) -> bool:
        """Whether it was built for ema_decay=0, and has another form with a running average."""
        return False
