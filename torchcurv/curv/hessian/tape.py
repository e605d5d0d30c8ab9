"""The tape: which torch functions a forward pass calls, with what their rules read of the arguments."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name

from torchcurv.curv.graph import Edge, base_of, edge_of, saved_tensors_are_packed, version_of
from torchcurv.curv.hessian.local import through
from torchcurv.curv.hessian.operation import Blank, Kept, Key, Op, Spec, flattened, key_of
from torchcurv.curv.hessian.rules import MOVES, RULES

SHAPED = {"expand_as", "view_as", "reshape_as", "type_as"}  # which read nothing of the second argument but its shape


def _calling_module(model: nn.Module | None) -> str:
    """The innermost module of a model that is running, as the stack has it."""
    names = {} if model is None else {id(module): name for name, module in model.named_modules()}
    frame = sys._getframe(1)
    while frame is not None and names:
        caller = frame.f_locals.get("self")
        if id(caller) in names:
            name = names[id(caller)]
            return f"module {name!r} ({type(caller).__name__})" if name else type(caller).__name__
        frame = frame.f_back  # type: ignore[assignment]
    return ""


class Tape(TorchFunctionMode):
    """Notes the torch functions that are called while it is active, those without a rule too.

    It keeps the nodes of the graph alive, and what the rules read of the arguments.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = model
        self.ops: list[Op] = []
        self._known: set[Key] = set()
        self.calls, self.last = 0, ""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = _name(func)
        if name is None or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        leaves, spec = flattened(args, kwargs)
        tensors = {k: x for k, x in enumerate(leaves) if isinstance(x, Tensor)}
        if not any(x.requires_grad for x in tensors.values()):
            return func(*args, **kwargs)
        read = {0} if name in SHAPED else tensors.keys()
        inputs = {k: edge_of(x) for k, x in tensors.items() if x.grad_fn is not None and k in read}
        self._known |= {key_of(edge) for edge in inputs.values()}
        kept = _kept(func, args, kwargs, leaves, inputs, RULES.get(name))  # before it edits them
        result = func(*args, **kwargs)
        self._note(func, name, inputs, kept, spec, result)
        return result

    def _note(self, func: Any, name: str, inputs: dict[int, Edge], kept: list[Any], spec: Spec, result: Any) -> None:
        several = isinstance(result, tuple | list)
        parts: dict[int | None, Any] = {**dict(enumerate(result))} if several else {None: result}
        new = {k: edge_of(x) for k, x in parts.items() if isinstance(x, Tensor) and x.grad_fn is not None}
        # What lies at an edge that is known made nothing: the same memory in the same order, or the same tensor.
        new = {k: edge for k, edge in new.items() if key_of(edge) not in self._known}
        if not new:
            return
        self.calls += 1
        rule = RULES.get(name)
        doubtful = rule is None or (len(inputs) > 1 and not rule.joint)
        inside = _calling_module(self.model) if doubtful else ""
        packed = saved_tensors_are_packed()
        for part, edge in new.items():
            slope = _slope(parts[part], edge) if rule is not None and rule.random else None
            shape, after = parts[part].shape, self.last
            self.ops.append(
                Op(func, name, self.calls, after, inputs, edge, shape, kept, spec, part, slope, inside, packed, rule)
            )
            self._known.add(key_of(edge))
        self.last = name


@cache
def _name(func: Callable[..., Any]) -> str | None:
    """Its name without the marks of methods and edits in place (add_, __iadd__); None for what only looks."""
    known = resolve_name(func)
    if known is None:
        return f"{getattr(func, '__name__', func)} (a function of its own)"
    path = known.split(".")
    if path[-1] == "__get__":
        return path[-2] if path[-2] in MOVES else None
    return path[-1].strip("_")


@cache
def _edits(func: Callable[..., Any]) -> inspect.Signature | None:
    """The signature of a function that has an argument `inplace`."""
    try:
        signature = inspect.signature(func)
    except (TypeError, ValueError):
        return None
    return signature if "inplace" in signature.parameters else None


def _in_place(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    if name.startswith("__i") and name.strip("_") not in ("invert", "iter", "index", "int"):
        return True
    signature = _edits(func)
    # F.threshold and boolean dispatches hide their signatures; `inplace` is then a keyword
    given = kwargs if signature is None else signature.bind(*args, **kwargs).arguments
    return bool(given.get("inplace", False))


def _kept(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any], inputs: dict[int, Edge], rule: Any
) -> list[Any]:
    if rule is None:
        return []
    copies = (rule.values or (rule.operands and len(inputs) > 1)) and _in_place(func, args, kwargs)

    def keep(k: int, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if k in inputs and not rule.values and not rule.operands:
            return Blank(x.shape, x.device)
        x = x.detach().clone() if copies and k in inputs else x.detach()
        return Kept(x, version_of(x))

    return [keep(k, x) for k, x in enumerate(leaves)]


def _slope(out: Tensor, edge: Edge) -> Tensor:
    """The mask / (1 - p) of a dropout, exact where its input is 0 too."""
    there = out if out.grad_fn is edge.node else base_of(out)
    assert there is not None
    return through(edge.node, torch.ones_like(there)).reshape(out.shape)
