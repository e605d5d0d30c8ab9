"""Hooks that can be switched off, and what every hook asks before it does anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchcurv.curv.unrolled import Unrolled


class Hook:
    """A bound hook that can be switched off, and is off after deepcopy and pickling: copies of the model feed nothing.

    The switch is a bool, so that a compiled model breaks its graph at the hooks only while they are on.
    """

    def __init__(self, target: Callable[..., Any] | None = None) -> None:
        self.target, self.on = target, target is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.target is None or not self.on:
            return None
        call = uncompiled if torch.compiler.is_compiling() else _plain
        return call(self.target, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook()

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def _plain(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return target(*args, **kwargs)


uncompiled = torch._disable_dynamo(_plain)  # unlike torch.compiler.disable, imports the compiler only when called


unseen = torch._C.DisableTorchFunction  # a context in which no mode sees what a hook looks at


@contextmanager
def unfused() -> Iterator[None]:
    """Attention and recurrent layers by functions that have a derivative of every order, and in forward mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), Unrolled():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def ignored() -> bool:
    """Forward passes that are none of the user's: recomputation inside a backward, function transforms, tracing."""
    return (
        not torch.is_grad_enabled()
        or torch._C._current_graph_task_id() != -1
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.jit.is_tracing()
    )


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str) -> Any:
    """An argument of a call, by position or name; None where there is none."""
    return args[position] if len(args) > position else kwargs.get(name)
