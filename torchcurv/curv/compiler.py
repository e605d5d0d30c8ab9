"""torch.compile: what is not compiled, and how a pass is taken out of it. Private names of its are here."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch._C._dynamo import eval_frame

never_compiled = torch._disable_dynamo  # a decorator; the compiler drops what a function writes to an optimizer


def untraced(function: Callable[..., Any]) -> Any:
    """A function that is not compiled; those that it calls are, but for what it says itself."""
    how = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.DEFAULT)
    eval_frame.set_code_exec_strategy(function.__code__, how)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    function._torchdynamo_disable_msg = (  # type: ignore[attr-defined]
        "a pass that measures curvature is not compiled: with fullgraph=True, give the optimizer the compiled model"
    )
    return function


@untraced
def uncompiled(target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """target(*args, **kwargs), and what it calls; unlike torch.compiler.disable, this does not import the compiler."""
    callback = eval_frame.get_eval_frame_callback()
    if callback is None:
        return target(*args, **kwargs)
    eval_frame.set_eval_frame(None)
    try:
        return target(*args, **kwargs)
    finally:
        eval_frame.set_eval_frame(callback)


class _Thread:
    """How many have switched the compiler off in one thread, and what there was before the first."""

    def __init__(self) -> None:
        self.ident, self.count = threading.get_ident(), 0
        self.callback: Any = None  # which compiles what is called
        self.stance: Any = None


class _Threads(threading.local):
    def __init__(self) -> None:
        self.own = _Thread()


_threads = _Threads()


class CompilerOff:
    """Runs what follows in this thread uncompiled, also functions that are compiled for themselves, until `close`.

    Several may be open, and close in any order: the hooks of two optimizers on one model do.
    """

    def __init__(self) -> None:
        thread = self._thread = _threads.own
        self._open = True
        if not thread.count:
            thread.callback = eval_frame.get_eval_frame_callback()
            if thread.callback is not None:
                eval_frame.set_eval_frame(None)
            loaded = "torch._dynamo" in sys.modules
            thread.stance = torch.compiler.set_stance("force_eager") if loaded else None
        thread.count += 1

    def close(self) -> None:
        if not self._open:
            return
        thread, self._open = self._thread, False
        thread.count -= 1
        if not thread.count:
            if thread.stance is not None:
                thread.stance.__exit__(None, None, None)
            if thread.callback is not None and thread.ident == threading.get_ident():
                eval_frame.set_eval_frame(thread.callback)
            thread.callback = thread.stance = None

    __del__ = close


untraced(CompilerOff.__init__)
untraced(CompilerOff.close)
