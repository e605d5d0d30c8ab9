"""Companions: what an optimizer keeps beside its blocks, and is told of what happens to them."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Group = dict[str, Any]


class Companion:
    """Something an optimizer keeps, of which a copy of the optimizer has one of its own.

    Every method but the constructor does nothing unless it is defined. optimizer: whose it is; a weak reference.
    """

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = weakref.proxy(optimizer)

    def gradients_gone(self) -> None:
        """zero_grad() was called, or a step has ended."""

    def step_ended(self) -> None:
        """A step has ended, and its number has grown."""

    def loaded(self, state: dict[Any, dict[str, Any]]) -> None:
        """Blocks and counters are those of `state` now: the optimizer was loaded or copied."""

    def removed(self) -> None:
        """Hooks are to be taken away."""

    def save(self, state: dict[str, Any], p: Tensor, group: Group) -> None:
        """Put into the state of a parameter what must survive; the keys are there from the first step on."""

    def hint(self) -> str | None:
        """Why no curvature was captured for the gradients that are there, if it knows."""
        return None

    def known(self) -> dict[str, Tensor]:
        """What `metrics` reports, as 0-d tensors."""
        return {}


def hint_of(companions: Mapping[Any, Companion]) -> str | None:
    return next((hint for companion in companions.values() if (hint := companion.hint()) is not None), None)


def buffer_of(state: dict[str, Any], p: Tensor, name: str = "momentum_buffer") -> Tensor:
    """A buffer like the parameter, in float32 or better; zeros at first."""
    if name not in state:
        state[name] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
    return state[name]


class Momentum(Companion):
    """The momentum buffers of groups with momentum."""

    def save(self, state: dict[str, Any], p: Tensor, group: Group) -> None:
        if group["momentum"]:
            buffer_of(state, p)
