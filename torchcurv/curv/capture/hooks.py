"""Hooks that can be switched off, and what every hook asks before it does anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from torchcurv.curv.compiler import uncompiled
from torchcurv.curv.graph import backward_id, in_transform


class Hook:
    """A bound hook that can be switched off, and is off after deepcopy and pickling: copies of the model feed nothing.

    The switch is a bool, so that a compiled model breaks its graph at the hooks only while they are on. Without
    gradients it is not even read, so that an evaluation is compiled once.
    """

    def __init__(self, target: Callable[..., Any] | None = None, untraced: bool = False) -> None:
        self.target, self.on, self.untraced = target, target is not None, untraced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or self.target is None or not self.on:
            return None
        return self.target(*args, **kwargs) if self.untraced else uncompiled(self.target, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "__name__":  # which torch.jit.script asks for
            raise AttributeError(
                "torch.jit.script cannot compile the hooks of an optimizer: script the model before the optimizer is "
                "built, or after optimizer.remove()"
            )
        raise AttributeError(name)

    @property
    def inert(self) -> bool:
        """Whether it is left over from a copy."""
        return self.target is None

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def is_inert(hook: Any) -> bool:
    """Whether it is a hook of ours that is left over from a copy."""
    return isinstance(hook, Hook) and hook.inert


def is_internal_forward() -> bool:
    """Forward passes that are none of the user's: recomputation inside a backward, function transforms, tracing."""
    return not torch.is_grad_enabled() or backward_id() != -1 or in_transform() or torch.jit.is_tracing()


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str) -> Any:
    """An argument of a call, by position or name; None where there is none."""
    return args[position] if len(args) > position else kwargs.get(name)
