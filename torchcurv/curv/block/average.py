"""The running average of what a block measures."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchcurv.curv.approximations.base import Approximation, Tensors
from torchcurv.curv.numerics import chosen, on_cpu


class RunningAverage:
    """w <- ρ^k w + 1, X <- X + (X_new - X) / w, for each statistic X.

    k: the steps since its last measurement, so that the memory in steps does not depend on how often one measures.

    tensors, weights: X and w. measured_at: by statistic, the step of its last measurement. changes: by statistic, how
    far the last measurement moved it, relative to its norm.
    """

    def __init__(self, approx: Approximation) -> None:
        self.approx = approx
        self.tensors: Tensors = {}
        self.weights: dict[str, Tensor] = {}
        self.measured_at: dict[str, int] = {}
        self.changes: dict[str, Tensor] = {}
        self._known = False  # whether `known` was true, where reading it costs nothing

    def __bool__(self) -> bool:
        return bool(self.tensors)

    @property
    def known(self) -> Tensor | None:
        """Whether a measurement has been let in, a 0-d bool tensor; None where that is beyond doubt."""
        weight = next(iter(self.weights.values()), None)
        if weight is None or self._known:
            return None
        known = weight > 0
        self._known = on_cpu(known) and bool(known)
        return None if self._known else known

    def merge(
        self, new: Tensors, total: Tensor | None, like: Tensor, decay: float, step: int | None, track_change: bool
    ) -> Tensor:
        """Merge a measurement; whether it was finite, a 0-d bool tensor: else it is left out.

        total: see `Pending`. like: a parameter of the block. decay: ρ.
        step: of the optimizer; without, k = 1. track_change: whether `changes` is found.
        """
        if self.approx.of_one_step:
            self.forget()
        keys = self.approx.measured_keys(new)
        for key in keys - self.weights.keys():
            self.weights[key] = like.new_zeros((), dtype=torch.promote_types(like.dtype, torch.float32))
        decayed = {key: self.weights[key] * decay ** self._since(key, step) for key in keys}
        grown = {key: weight + 1 for key, weight in decayed.items()}
        shares = {key: 1 / weight for key, weight in grown.items()}
        merged = self.approx.averaged(self.tensors, new, total, shares, track_change)
        for key, weight in grown.items():
            self.weights[key] = chosen(merged.ok, weight, decayed[key])
        self.tensors = {**self.tensors, **merged.tensors}
        for key, change in merged.changes.items():
            name = self.approx.statistic_of(key)
            self.changes[name] = torch.maximum(self.changes[name], change) if name in self.changes else change
        if step is not None:
            self.measured_at |= {self.approx.statistic_of(key): step for key in keys}
        return merged.ok

    def _since(self, key: str, step: int | None) -> int:
        """Steps since the last measurement of a statistic."""
        last = self.measured_at.get(self.approx.statistic_of(key))
        return 1 if step is None or last is None else max(1, step - last)

    def forget(self) -> None:
        self.tensors, self.weights, self._known = {}, {}, False

    def state(self) -> dict[str, Any]:
        """The steps of the last measurements; the tensors are saved with what is not known yet (`Curvature.state`)."""
        return {"measured_at": {name: self.measured_at.get(name, -1) for name in self.approx.statistics}}

    def load_state(self, saved: dict[str, Any]) -> None:
        self._known, known = False, saved.get("known", {})
        self.measured_at = {name: int(t) for name, t in saved.get("measured_at", {}).items() if t >= 0}
        self.tensors = {key: value for key, value in saved.get("tensors", {}).items() if known[key]}
        self.weights = {key: value for key, value in saved.get("weights", {}).items() if known[key]}
