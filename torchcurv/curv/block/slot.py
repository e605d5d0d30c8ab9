"""One factor of a block, and the damping it was made for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchcurv.curv.approximations.factor import Factor, with_tensors
from torchcurv.curv.numerics import on_cpu


@dataclass
class FactorSlot:
    """A factor of the running average; None: there is none yet.

    damping: as the user gave it, of the factor; nan where it is not known or came as a tensor.
    """

    factor: Factor | None = None
    damping: float = math.nan

    @property
    def ready(self) -> bool:
        """Whether it can be solved with."""
        return self.factor is not None and self.factor.ready

    @property
    def holds_damping(self) -> bool:
        """Whether another damping asks for another factor."""
        return self.factor is None or self.factor.holds_damping

    def put(self, new: Factor, ok: Tensor, damping: float | Tensor) -> None:
        """Take a new factor if it could be computed; else the last good one stays."""
        self.factor = self.after(new, ok)
        self.damping = math.nan if isinstance(damping, Tensor) else float(damping)

    def after(self, new: Factor, ok: Tensor) -> Factor:
        """What the factor is once a new one was put."""
        return new if self.factor is None else _choose(ok, new, self.factor)


def _choose(ok: Tensor, new: Factor, old: Factor) -> Factor:
    """new if ok else old, without a host sync on an accelerator."""
    if on_cpu(ok):
        return new if ok else old
    kept, fresh = old.state(), new.state()
    if type(new) is not type(old) or {k: x.shape for k, x in kept.items()} != {k: x.shape for k, x in fresh.items()}:
        return new
    chosen = {key: torch.where(ok, value, kept[key]) for key, value in fresh.items()}
    return with_tensors(new, chosen)
